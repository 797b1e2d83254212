"""TRL's side of against_trl.py: GRPOTrainer or DistillationTrainer on a given workload, in TRL's own environment.

Started by against_trl.py with the interpreter given as --trl-python; see ``workload.Gate`` for what it prints. TRL's
defaults stand but for what makes the work the same (optimiser, clips, temperature, no activation checkpointing,
float32) and for the size of a micro-batch. Generated tokens are counted where TRL cuts them at their end token, trained
tokens where its loss is computed; an optimiser step is counted as the Trainer does.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from workload import (
    BETAS,
    CLIP,
    DUAL_CLIP,
    EPS,
    GRAD_CLIP,
    LR,
    SHAPES,
    TEMPERATURE,
    WEIGHT_DECAY,
    Gate,
    correct,
    prescribe,
    problems,
    shape_of,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["grpo", "distillation"], required=True)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--rows", type=int, required=True, help="rollouts of a micro-batch")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    gate = Gate()

    import torch
    import transformers
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList, TrainerCallback

    torch.set_num_threads(args.threads)
    shape = shape_of(args.shape, args.scale)
    model = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.student, padding_side="left")
    counts: dict[str, int] = {}
    watched = next(parameter for name, parameter in model.named_parameters() if name.endswith("q_proj.weight"))
    start = watched.detach().clone()

    class Prescribed(LogitsProcessor):
        """Responses of the step's lengths; a step's rows come in one batch, prompt by prompt."""

        def __init__(self, width: int) -> None:
            self.width = width
            self.lengths = shape.lengths(warm=trainer.state.global_step == 0)

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return prescribe(scores, input_ids.shape[1] - self.width, self.lengths, trainer.eos_token_ids)

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate.next_step(
                **counts, optimiser_steps=trainer.state.global_step,
                weights_moved=float((watched.detach() - start).norm()),
                versions={"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
            )  # fmt: skip
            counts.update(generated=0, trained=0, prompt_tokens=0)

    grpo = args.method == "grpo"
    copies = 1 if grpo else shape.samples  # the distillation trainer knows no groups: it gets a prompt once a sample
    texts = [text for text in problems(shape, args.steps) for _ in range(copies)]
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in texts])
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder, "per_device_train_batch_size": args.rows,
            "gradient_accumulation_steps": shape.rows // args.rows, "max_completion_length": shape.high,
            "temperature": TEMPERATURE, "top_p": 1.0, "top_k": 0, "learning_rate": LR,
            "lr_scheduler_type": "constant", "adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "adam_epsilon": EPS,
            "weight_decay": WEIGHT_DECAY, "max_grad_norm": GRAD_CLIP, "max_steps": args.steps,
            "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "shuffle_dataset": False,
            "save_strategy": "no", "logging_steps": 1, "report_to": [], "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }  # fmt: skip
        shared: dict[str, Any] = {
            "model": model, "train_dataset": data, "processing_class": tokenizer, "callbacks": [Steps()],
        }  # fmt: skip
        trainer: Any
        if grpo:

            def reward(completions: list[Any], **_: Any) -> list[float]:
                return [float(correct(index % shape.samples)) for index in range(len(completions))]

            config = trl.GRPOConfig(
                **common, num_generations=shape.samples, beta=0.0, epsilon=CLIP, delta=DUAL_CLIP, loss_type="dapo"
            )
            trainer = trl.GRPOTrainer(**shared, args=config, reward_funcs=reward)
            gate.timed(trainer, "_calculate_rewards", "verify")
        else:
            teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32)
            trainer = trl.DistillationTrainer(
                **shared, args=trl.DistillationConfig(**common, beta=1.0), teacher_model=teacher
            )
            gate.timed(teacher.base_model, "forward", "teacher_backbone")
        generate, single_turn, compute_loss = model.generate, trainer._generate_single_turn, trainer._compute_loss

        def prescribed(**inputs: Any) -> torch.Tensor:
            counts["prompt_tokens"] += int(inputs["attention_mask"].sum())
            processor = LogitsProcessorList([Prescribed(inputs["input_ids"].shape[1])])
            with gate.stage("generation"):
                return generate(**inputs, logits_processor=processor)

        def counted(*inputs: Any, **more: Any) -> Any:
            found = single_turn(*inputs, **more)
            counts["generated"] += sum(map(len, found[0] if grpo else found))
            return found

        def loss(module: Any, inputs: Any, *more: Any) -> Any:
            counts["trained"] += int(inputs["completion_mask"].sum())
            return compute_loss(module, inputs, *more)

        model.generate, trainer._generate_single_turn, trainer._compute_loss = prescribed, counted, loss
        trainer.train()


if __name__ == "__main__":
    main()
