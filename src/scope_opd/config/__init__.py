"""The config of a run: typed tables, strict keys, presets, and the rules that hold between settings.

Every table is a pydantic model that refuses unknown keys (with the nearest known name). Mistakes become a
``ConfigError`` with the value found, the value expected and the remedy. Nothing here touches a model or a device: what
exists is checked where it is opened. Secrets never live in a config: fields name the environment variable or file that
holds them.
"""

from scope_opd.config.base import AlarmAction, Table
from scope_opd.config.launch import LaunchConfig
from scope_opd.config.load import load_config, read_values, validate_config
from scope_opd.config.schema import Config
from scope_opd.config.servers import RolloutConfig, ServerConfig, ServerFlags, ServingConfig, TeacherConfig
from scope_opd.config.tables import (
    PRESETS,
    AlarmsConfig,
    ChatConfig,
    DataConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    TrainConfig,
    VerifyConfig,
)

__all__ = [
    "PRESETS",
    "AlarmAction",
    "AlarmsConfig",
    "ChatConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "LaunchConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "RolloutConfig",
    "RunConfig",
    "ServerConfig",
    "ServerFlags",
    "ServingConfig",
    "Table",
    "TeacherConfig",
    "TrainConfig",
    "VerifyConfig",
    "load_config",
    "read_values",
    "validate_config",
]
