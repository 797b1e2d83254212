"""TRL's side of `benchmarks/pipeline.py`: GRPOTrainer steps on the zoo's student, in TRL's own environment.

Prints one JSON line: seconds of each step after the warm-up, peak resident memory, versions. Started by pipeline.py
with the interpreter given as --trl-python; of scope_opd it imports only the task (no torch, no engine).
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    import torch
    import transformers
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from scope_opd.zoo.task import check_work, load_rows

    torch.set_num_threads(args.threads)
    rows = load_rows("train")[: args.prompts * (args.steps + args.warmup)]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["problem"]}],
                "problem": row["problem"],
                "answer": row["answer"],
            }
            for row in rows
        ]
    )

    def reward(completions, problem, answer, **_):
        texts = [completion[0]["content"] for completion in completions]
        return [float(check_work(p, a, t)[0]) for p, a, t in zip(problem, answer, texts, strict=True)]

    class Clock(TrainerCallback):
        def __init__(self):
            self.marks = []

        def on_step_end(self, *_, **__):
            self.marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=args.prompts * args.samples,
            num_generations=args.samples,
            max_completion_length=64,
            temperature=0.6,
            top_p=1.0,
            top_k=0,
            beta=0.0,
            epsilon=0.2,
            delta=3.0,
            loss_type="dapo",
            learning_rate=3e-4,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            max_steps=args.steps + args.warmup,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            shuffle_dataset=False,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            log_completions=False,
        )
        clock = Clock()
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
            reward_funcs=reward,
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[clock],
        )
        stdout, sys.stdout = sys.stdout, sys.stderr
        try:
            trainer.train()
        finally:
            sys.stdout = stdout
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    seconds = [after - before for before, after in zip(clock.marks, clock.marks[1:], strict=False)][args.warmup - 1 :]
    print(
        json.dumps(
            {
                "step_s": [round(value, 4) for value in seconds],
                "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
                "reward_mean": round(sum(entry["reward"] for entry in log) / max(len(log), 1), 4),
                "mean_length": round(sum(entry["completions/mean_length"] for entry in log) / max(len(log), 1), 1),
                "trl": trl.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
