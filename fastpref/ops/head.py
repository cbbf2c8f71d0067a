"""A language-model head, and the checks and casts that every function with a head shares."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastpref.checks import (
    check_device,
    check_flag,
    check_floating,
    check_head,
    check_ignore_index,
    check_integers,
    check_number,
    check_shape,
    refuse,
)
from fastpref.ops.backend import autocasts
from fastpref.ops.torch_tiles import LogitTransform

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fastpref.parallel.vocab_shard import VocabShard


class Head(NamedTuple):
    r"""A language-model head: what turns hidden states into logits.

    .. math:: Q = \mathrm{softcap}(\mathrm{logit\_scale}\,(h W^\top + b)), \qquad
              \mathrm{softcap}(x) = c \tanh(x / c)

    Functions with a ``head`` argument take a `Head`, or the bare weight where it has nothing else.
    `fastpref.models.lm_head_of` gives the `Head` of a transformers model.

    Example:
        >>> head = Head(torch.randn(50, 8), softcap=30.0)
        >>> linear_logps(torch.randn(2, 3, 8), head, torch.tensor([[4, 9, 2], [1, 2, 3]])).shape
        torch.Size([2, 3])
    """

    weight: Tensor  #: (V, H) in the dtype of the hidden states; a DTensor may be sharded
    bias: Tensor | None = None  #: (V,)
    logit_scale: float = 1.0  #: as in Cohere and Granite
    softcap: float | None = None  #: as in Gemma; above 0
    group: ProcessGroup | None = None  #: processes of which each has some rows of weight and bias


class PreparedHead(NamedTuple):
    """Plain tensors on this process, checked and cast, and what happens to their product."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H), or this process's rows of it
    bias: Tensor | None  # (V,), or this process's numbers of it
    transform: LogitTransform
    shard: VocabShard | None  # where the head is only a part of the vocabulary

    def trains(self) -> bool:
        """Whether the head wants a gradient."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def vocab_size(self) -> int:
        """The number of tokens, of all processes where each has a part."""
        return self.weight.shape[0] if self.shard is None else self.shard.total

    def cut(self, stop: int, *, start: int = 0) -> PreparedHead:
        """The same with some of the tokens that this process has."""
        if start == 0 and stop == self.weight.shape[0]:
            return self
        bias = None if self.bias is None else self.bias[start:stop]
        return self._replace(weight=self.weight[start:stop], bias=bias)


def prepare_head(
    hidden: Tensor,  # (..., H)
    head: Head | Tensor,
    temperature: float,
    ignore_index: int,
    compact: bool,
    *,
    prefix: str = "",
) -> PreparedHead:
    """Check what every function with a head takes; cast the operands as autocast wants them.

    A head that is spread over processes is gathered, unless it is sharded over the vocabulary.
    What is refused is called by its name after ``prefix``, where a function has several heads.
    """
    weight, bias, logit_scale, softcap, group = as_head(head, prefix=prefix)
    transform = LogitTransform(
        check_number(f"{prefix}temperature", temperature, above=0),
        check_number(f"{prefix}logit_scale", logit_scale),
        None if softcap is None else check_number(f"{prefix}softcap", softcap, above=0),
    )
    check_ignore_index(ignore_index)
    check_flag("compact", compact)
    shard = None
    if group is not None:
        from fastpref.parallel.vocab_shard import shard_of_group

        shard = shard_of_group(hidden, weight, bias, group, prefix=prefix)
    elif _is_distributed(hidden, weight, bias):
        from fastpref.parallel.placements import local_head

        hidden, weight, bias, shard = local_head(hidden, weight, bias, prefix=prefix)
    if shard is not None:
        from fastpref.parallel.vocab_shard import at_least_one_token

        weight, bias, transform = at_least_one_token(weight, bias, transform)
    check_floating(f"{prefix}hidden", hidden)
    check_floating(f"{prefix}weight", weight)
    if bias is not None:
        check_floating(f"{prefix}bias", bias)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    check_head(hidden, weight, bias, prefix=prefix)
    return PreparedHead(hidden.reshape(-1, hidden.shape[-1]), weight, bias, transform, shard)


def prepare_labelled(
    hidden: Tensor,  # (..., H)
    head: Head | Tensor,
    labels: Tensor,  # (...) integers
    temperature: float,
    ignore_index: int,
    compact: bool,
    *,
    prefix: str,
) -> tuple[PreparedHead, Tensor]:
    """`prepare_head` of a whole head, and the labels (N,) of the hidden states."""
    name = f"{prefix}hidden"
    check_floating(name, hidden)
    check_integers("labels", labels)
    check_device("labels", labels, name, hidden)
    check_shape("labels", labels, hidden.shape[:-1], f"{name} without its last dimension")
    temperature = check_number("temperature", temperature, above=0)
    ready = prepare_head(hidden, head, temperature, ignore_index, compact, prefix=prefix)
    if ready.shard is not None:
        refuse(f"{prefix}head", "one that is not sharded over the vocabulary", "one that is")
    return ready, labels.to(torch.int64).reshape(-1)


def cut_alike(heads: list[PreparedHead], prefixes: tuple[str, ...]) -> list[PreparedHead]:
    """Heads of one function, cut to the tokens that all of them have.

    Where the first is sharded over the vocabulary, each of the others becomes the same shard.
    """
    vocab_size, shard = min(one.vocab_size() for one in heads), heads[0].shard
    for prefix, one in zip(prefixes, heads, strict=False):
        if one.shard is not None and not (shard is not None and one.shard.is_like(shard)):
            expected = "a whole one" if shard is None else f"a whole one, or {shard.words()}"
            refuse(f"{prefix}head", f"{expected}, like {prefixes[0]}head", one.shard.words())
    if shard is None:
        return [one.cut(vocab_size) for one in heads]

    from fastpref.parallel.vocab_shard import at_least_one_token

    shard, found = shard.cut(vocab_size), []
    for one in heads:
        start = shard.start if one.shard is None else 0
        part = one.cut(start + shard.size, start=start)
        weight, bias, transform = at_least_one_token(part.weight, part.bias, part.transform)
        found.append(PreparedHead(part.hidden, weight, bias, transform, shard))
    return found


def as_head(head: Head | Tensor, *, prefix: str = "") -> Head:
    """A `Head` of a bare weight; a `Head` as it is."""
    if isinstance(head, Tensor):
        return Head(head)
    if not isinstance(head, Head):
        refuse(f"{prefix}head", "a Head or a tensor (V, H), its weight", type(head).__name__)
    return head


def head_on(head: Head, device: torch.device) -> Head:
    """The head on a device; the head itself where it is there."""
    bias = None if head.bias is None else head.bias.to(device)
    return head._replace(weight=head.weight.to(device), bias=bias)


def vocabulary_size(head: Head | Tensor) -> int:
    """The number of tokens, of all processes where they share the head."""
    weight, _, _, _, group = as_head(head)
    check_floating("weight", weight)
    if group is None:
        return weight.shape[0]
    from fastpref.parallel.vocab_shard import shard_of_group

    return shard_of_group(weight, weight, None, group).total


def _is_distributed(*tensors: Tensor | None) -> bool:
    """Whether a ``DTensor`` is among them, without an import of what most never use."""
    return any(type(tensor).__name__ == "DTensor" for tensor in tensors)


def _autocast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What ``torch.nn.functional.linear`` does to its arguments under autocast."""
    if not autocasts(hidden.device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return cast(hidden), cast(weight), None if bias is None else cast(bias)
