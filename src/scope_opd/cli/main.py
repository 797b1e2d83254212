"""``scope``: names the commands, and turns every way they end into an exit code.

Exit codes: 0 done; 1 the run or a check failed; 2 bad input or config; 130 interrupted. A mistake is one ``error:``
line on stderr with what was found, what was expected and the remedy; a traceback is a bug of ours.

Command modules import what they need when they are called, so that ``scope --help`` loads neither torch nor
transformers.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence

from cyclopts import (
    App,
    CycloptsError,
    MissingArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from scope_opd import __version__
from scope_opd.cli.names import nearest
from scope_opd.errors import ScopeError

COMMANDS = {
    "demo": "demo:demo",
    "train": "train_command:train",
    "plan": "plan_command:plan",
    "serve": "serve_command:serve",
    "launch": "launch_command:launch",
    "weights": "weights:weights",
    "score": "score_command:score",
    "export": "export_command:export",
    "eval": "eval_command:evaluate",
    "compare": "compare_command:compare",
    "verify": "verify_command:verify",
    "report": "report_command:report",
    "data": "data_command:app",
    "zoo": "zoo_command:app",
    "doctor": "doctor:doctor",
}
"""Name and place of each command. Its help is its docstring and its module's EXAMPLES, so that module is imported for
``scope --help`` and must be cheap."""
HELP = "SCOPE: signal-calibrated on-policy distillation of small language models."
EXAMPLES = """Examples:
  scope demo                                     see it work on two CPU cores
  scope doctor CONFIG.toml                       check a run before it starts
  scope train CONFIG.toml --set train.steps=20   train your own student
  scope COMMAND --help                           options and examples
"""


def build_app() -> App:
    """The command tree."""
    app = App(
        name="scope",
        help=HELP,
        help_epilogue=EXAMPLES,
        help_format="plaintext",
        version=__version__,
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
        suppress_keyboard_interrupt=False,
    )
    for name, target in COMMANDS.items():
        place, _, attribute = target.partition(":")
        module = importlib.import_module(f"scope_opd.cli.{place}")
        command = getattr(module, attribute)
        if isinstance(command, App):
            command.help_epilogue = ""
            app.command(command)
        else:
            app.command(command, name=name, help_epilogue=module.EXAMPLES)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments after the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    # transformers imports torchao wherever it is installed, and what it then says it lacks concerns no run.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        result = build_app()(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except CycloptsError as error:
        return _fail(usage_line(error), 2)
    except ScopeError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of a pipe has seen enough (``scope weights ... | head``). Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror or error}; expected a usable file system; check path and free space", 1)


def usage_line(error: CycloptsError) -> str:
    """A mistake on the command line as one line, with the nearest known name where a name is unknown."""
    command = " ".join(("scope", *(error.command_chain or ())))
    see = f"see {command} --help"
    if isinstance(error, UnknownCommandError) and error.unused_tokens:
        token = error.unused_tokens[0]
        kind = "option" if token.startswith("-") else "command"
        known = [name for name in (error.app or ()) if name.startswith("--") == (kind == "option") and name != "-h"]
        return f"unknown {kind} {token}; expected {nearest(token, known)}; {see}"
    if isinstance(error, UnknownOptionError):
        name = (error.token.keyword or error.token.value).split("=", 1)[0]
        known = [option for argument in error.argument_collection for option in argument.names if argument.parse]
        known = [option for option in known if option.startswith("--")] + ["--help"]
        return f"unknown option {name} of {command}; expected {nearest(name, known)}; {see}"
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return f"unexpected argument {error.unused_tokens[0]}; expected none there; {see}"
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        return f"{command} lacks a value for {error.keyword or error.argument.name}; expected one; {see}"
    text = " ".join(str(error).split()).rstrip(".")
    return f"{text[:1].lower()}{text[1:]}; {see}"


def _fail(line: str, code: int) -> int:
    print(f"error: {' '.join(line.split())}", file=sys.stderr)
    return code
