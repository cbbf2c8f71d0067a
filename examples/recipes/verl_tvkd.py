"""TVKD in verl's SFT trainer: pairs instead of conversations, and another loss.

    torchrun --nproc_per_node 8 verl_tvkd.py data.train_files=pairs-with-values.parquet \
        data.pad_mode=no_padding data.use_dynamic_bsz=False data.micro_batch_size_per_gpu=2 \
        data.train_batch_size=64 model.path=... trainer.total_epochs=1 ...

`train_batch_size` counts pairs, `micro_batch_size_per_gpu` their rows: it is even. The file is one
that `fastpref values` wrote. Written against verl 0.9.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import hydra
import torch
from torch import Tensor
from verl.trainer.sft_trainer import SFTTrainer
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.utils.device import auto_set_device
from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group

import fastpref
from fastpref.data import read_rows

Row = dict[str, Tensor]
BETA, ALPHA = 0.01, 0.7


class Pairs(torch.utils.data.Dataset[list[Row]]):
    """The chosen and the rejected sequence of each pair."""

    def __init__(self, file: str, tokenizer: Any, max_length: int) -> None:
        self.rows, self.tokenizer, self.max_length = read_rows(file), tokenizer, max_length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Row]:
        """What verl reads of a sequence, and the teacher's shaping of its response."""
        batch = fastpref.collate_pairs(
            [self.rows[index]], self.tokenizer, max_length=self.max_length
        )
        in_response = torch.nn.functional.pad(batch["labels"] != -100, (1, 0))
        return [
            {
                "input_ids": tokens[mask == 1],
                "position_ids": torch.arange(int(mask.sum())),
                "loss_mask": response[mask == 1].long(),
                "shaping": shaping.view(1),
            }
            for tokens, mask, response, shaping in zip(
                batch["input_ids"], batch["attention_mask"], in_response, batch["shaping"],
                strict=True,
            )
        ]  # fmt: skip


class PairCollator(SFTTensorCollator):
    """verl's own batches, of both sequences of each pair side by side."""

    def __call__(self, batch: Sequence[Sequence[Row]]) -> dict[str, Any]:
        """Rows 0 and 1 are the first pair, 2 and 3 the second."""
        found: dict[str, Any] = super().__call__([row for pair in batch for row in pair])
        return found


def tvkd(
    model_output: Mapping[str, Tensor], data: Mapping[str, Any], dp_group: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """A micro-batch's part of the mean over all pairs: verl adds the parts up."""
    logps = model_output["log_probs"]  # nested: one after another, each of the token that follows
    boundaries = logps.offsets()
    in_response = data["loss_mask"].values().roll(-1).bool()
    in_response[boundaries[1:] - 1] = False  # what follows there is the next sequence
    labels = torch.where(in_response, 0, -100)
    rows = fastpref.sum_responses(logps.values(), labels, cu_seqlens=boundaries)
    chosen_first = torch.arange(rows.sequences(), device=labels.device).view(-1, 2).T.flatten()
    responses = fastpref.Responses(rows.logps[chosen_first], rows.lengths[chosen_first])
    shaping = data["shaping"].values()[chosen_first]
    loss = fastpref.losses.tvkd(responses, shaping, beta=BETA, alpha=ALPHA).loss
    share = rows.sequences() / 2 / data["global_batch_size"]
    return loss * share * data["dp_size"], {}


class TVKDTrainer(SFTTrainer):
    """verl's SFT trainer on pairs."""

    def _build_dataset(self) -> None:
        data, tokenizer = self.config.data, self.model_config.tokenizer
        if data.use_dynamic_bsz or data.micro_batch_size_per_gpu % 2:
            got = f"{data.use_dynamic_bsz} and {data.micro_batch_size_per_gpu}"
            expected = "expected use_dynamic_bsz=False and an even micro_batch_size_per_gpu"
            raise ValueError(f"data: {expected}, got {got}")  # or pairs would be torn apart
        self.train_dataset = Pairs(data.train_files, tokenizer, data.max_length)
        self.val_dataset = (
            Pairs(data.val_files, tokenizer, data.max_length) if data.val_files else None
        )

    def _build_engine(self) -> None:
        super()._build_engine()
        self.training_client.set_loss_fn(loss_fn=tvkd)

    def _build_dataloader(self) -> None:
        super()._build_dataloader()
        for loader in (self.train_dataloader, self.val_dataloader):
            if loader is not None:
                loader.collate_fn = PairCollator(self.config.data.pad_mode)


@hydra.main(
    config_path="pkg://verl.trainer.config", config_name="sft_trainer_engine", version_base=None
)
def main(config: Any) -> None:
    """Train with the options of verl's own SFT trainer."""
    auto_set_device(config)
    initialize_global_process_group()
    TVKDTrainer(config).fit()
    destroy_global_process_group()


if __name__ == "__main__":
    main()
