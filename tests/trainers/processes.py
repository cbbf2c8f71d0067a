"""Train in one of several processes and write what came of it: run by test_processes.py."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import accelerate_loop
import torch
from accelerate import PartialState
from peft import LoraConfig
from tiny_models import tiny_model
from training import TOKENIZER, dataset, history, models_for, signal, student, trainer

from fastpref.integrations.trl import (
    DRDOConfig,
    DRDOTrainer,
    PreferenceConfig,
    PreferenceTrainer,
    TVKDConfig,
    TVKDTrainer,
)
from fastpref.models.reward_head import add_reward_head

PAIRS_A_STEP = 4


def tvkd(folder: Path, **settings):
    """With a teacher that reads along and a reference of its own."""
    return trainer(
        TVKDTrainer, TVKDConfig, folder, student(), settings={"reference_free": False, **settings},
        ref_model=student(seed=5), teacher_model=tiny_model(TOKENIZER, seed=7),
        teacher_processing_class=TOKENIZER,
    )  # fmt: skip


def tvkd_with_lora(folder: Path, **settings):
    """The adapter's start is not zero, so that there is something to learn at once."""
    return trainer(
        TVKDTrainer, TVKDConfig, folder, student(),
        settings={"gradient_checkpointing": True, **settings},
        train_dataset=dataset(**signal("shaping")),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )  # fmt: skip


def drdo(folder: Path, **settings):
    oracle = tiny_model(TOKENIZER, seed=7)
    add_reward_head(oracle)
    return trainer(
        DRDOTrainer, DRDOConfig, folder, student(), settings=settings,
        oracle_model=oracle, oracle_processing_class=TOKENIZER,
    )  # fmt: skip


def tdpo_and_dpkd(folder: Path, **settings):
    """The student beside a reference and a teacher; both losses are means over pairs."""
    return trainer(
        PreferenceTrainer, PreferenceConfig, folder, student(),
        settings={"method": ["tdpo", "dpkd"], "method_weights": [1.0, 0.5], **settings},
        **models_for("tdpo"), **models_for("dpkd"),
    )  # fmt: skip


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    for make in (tvkd, tvkd_with_lora, drdo, tdpo_and_dpkd):
        for steps in (1, 2):  # of gradient accumulation
            size = PAIRS_A_STEP // state.num_processes // steps
            found = make(
                folder,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
                adam_epsilon=1e-2,  # else Adam makes steps of gradients that are roundings
            )
            logged = history(found)
            if state.num_processes > 1:
                wrapped = type(found.model_wrapped).__name__
                assert wrapped == "DistributedDataParallel", wrapped
            if state.is_main_process:
                parameters = {
                    name: value for name, value in found.model.named_parameters()
                    if value.requires_grad
                }  # fmt: skip
                file = folder / f"{make.__name__}-{steps}-{state.num_processes}.pt"
                torch.save((logged, parameters), file)
    options = {
        "student": folder / "student",
        "dataset": folder / "shaped.parquet",
        "output_dir": folder / "loop",
        "batch_size": PAIRS_A_STEP // 2 // state.num_processes,
    }
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    logged = accelerate_loop.main([*given, "--cpu"])
    if state.is_main_process:
        torch.save(logged, folder / f"loop-{state.num_processes}.pt")


def by_command(arguments: list[str]) -> None:
    """What ``torchrun -m fastpref ...`` runs in each process, with these arguments."""
    sys.argv[1:] = arguments
    try:
        runpy.run_module("fastpref", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        assert not ended.code, ended.code


if __name__ == "__main__":
    folder, *command = sys.argv[1:]
    main(Path(folder))
    by_command(command)
