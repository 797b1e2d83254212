"""The distillation term of every kind but "sampled": a divergence of whole distributions, differentiated.

    loss_t = distill_t sg(c_t) D_t(theta)

D_t compares student and teacher at the place that predicts token t, both conditional on the ids that mean the same to
both and that both heads have:

    full_kl          KL(student || teacher) over all of these ids
    jsd              Jensen-Shannon divergence over all of these ids
    topk_reverse_kl  KL(student || teacher) over the teacher's k likeliest of them and one bucket for the others
    topk_forward_kl  KL(teacher || student) over the same buckets

The first two need a teacher in process, whose logits are made beside the student's a chunk at a time and once more in
the backward pass. The others need k numbers a token of it: its own head's, or the rows of servers that came with the
rollouts (``MicroBatch.teacher_ids``). The student's side is taken by ``models.head`` in tiles, the mass of its other
ids summed up directly, so that no tensor is as wide as the vocabulary. A teacher's tail is summed up likewise in
process, and is 1 - sum of its k probabilities behind servers.

Not covered: the student's own top-k ids scored by a server (vLLM's call for given ids a row needs its second model
runner, which CPU builds lack), coefficients and corrections (``forward``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scope_opd.models.head import HeadView, TokenScores, map_logits, score_hidden
from scope_opd.objective.divergences import full_kl, jsd, over_common_ids, topk_forward_kl, topk_reverse_kl
from scope_opd.objective.logprobs import tempered
from scope_opd.train.batch import MicroBatch
from scope_opd.train.engines import SurrogateSettings, TeacherHead

Divergence = Callable[..., Tensor]

EXACT: dict[str, Divergence] = {"full_kl": full_kl, "jsd": jsd}
"""Over the whole vocabulary."""
TOPK: dict[str, Divergence] = {"topk_reverse_kl": topk_reverse_kl, "topk_forward_kl": topk_forward_kl}
"""Over the teacher's k likeliest ids and a tail."""
CHUNK_LOGITS = 2**25
"""Logits of a chunk at most, 128 MiB in float32; an exact divergence holds about six tensors of that size. Every chunk
makes a gradient of the whole head, so that many small ones take longer."""
RESOLUTION = 2.0**-23
"""Servers' log-probs are float32: a mass that is left below this is not told apart from none."""


class Distillation:
    """Log-probs of a micro-batch's tokens together with their D_t.

    Args:
        view: of the student.
        settings: ``distill`` is one of ``EXACT`` or ``TOPK``.
        teacher: in process; None where servers gave rows, which only ``TOPK`` can do with.
        device: of both.

    Raises:
        ValueError: an exact kind without a teacher in process, or no id that both heads have is common.
    """

    def __init__(
        self, view: HeadView, settings: SurrogateSettings, teacher: TeacherHead | None, device: torch.device
    ) -> None:
        kind = settings.distill
        if kind in EXACT and teacher is None:
            raise ValueError(f"distill = {kind!r} without teacher_head; expected an in-process teacher")
        self.view, self.settings, self.teacher, self.device = view, settings, teacher, device
        widths = [view.vocabulary] if teacher is None else [view.vocabulary, teacher.vocabulary]
        self._width = min(widths)
        self._common = _common_ids(settings.common_vocabulary, self._width).to(device)
        self._known = torch.zeros(self._width + 1, dtype=torch.bool, device=device)
        self._known[self._common] = True
        # All ids in front of the others, as where heads are padded, need no copy of the logits.
        self._in_front = int(self._common[-1]) == self._common.numel() - 1
        # Ids that only one of the two has, or that mean something else to the other.
        self._not_own, self._not_theirs = _others(self._common, widths[0]), _others(self._common, widths[-1])

    def scores(self, hidden: Tensor, micro: MicroBatch, extra_temperature: float | None) -> tuple[TokenScores, Tensor]:
        """The student's log-probs, and D_t where a token distils, 0 elsewhere; both with gradient.

        Args:
            hidden: [T, H], the student's, that predict the tokens of ``micro``; under the student's autocast.
            micro: on the student's device.
            extra_temperature: as for ``models.head.score_hidden``.

        Returns:
            ``TokenScores`` and F[T], nats, >= 0.

        Raises:
            ValueError: neither a teacher in process nor rows of servers.
        """
        places = (micro.distill != 0).nonzero().squeeze(-1)
        if places.numel() and self.settings.distill in TOPK:
            return self._bucketed(hidden, micro, places, extra_temperature)
        scores = self._score(hidden, micro, extra_temperature)
        nothing = torch.zeros_like(scores.logprobs)
        if not places.numel():
            return scores, nothing
        return scores, nothing.index_put((places,), self._exact(hidden[places], self._hidden(micro, places)))

    def _exact(self, hidden: Tensor, theirs: Tensor) -> Tensor:
        divergence, teacher = EXACT[self.settings.distill], self.teacher
        assert teacher is not None

        def reduce(logits: Tensor, other: Tensor) -> tuple[Tensor]:
            own = tempered(logits, self.settings.student_temperature)
            with torch.no_grad(), self._own_dtype():
                logits_of_teacher = teacher.project(other).to(own.dtype)
            return (divergence(self._at_common_ids(own), self._at_common_ids(logits_of_teacher)),)

        chunk = max(1, CHUNK_LOGITS // self.view.vocabulary)
        return map_logits(self.view, hidden, reduce, theirs, chunk_tokens=chunk)[0]

    def _bucketed(
        self, hidden: Tensor, micro: MicroBatch, places: Tensor, extra_temperature: float | None
    ) -> tuple[TokenScores, Tensor]:
        ids, theirs, their_rest = self._teacher_rows(micro, places)
        wanted = torch.full((hidden.shape[0], ids.shape[1]), -1, dtype=torch.long, device=ids.device)
        wanted[places] = ids
        scores = self._score(hidden, micro, extra_temperature, ids=wanted, rest=True, excluded=self._not_own)
        assert scores.id_logprobs is not None
        assert scores.rest_logprobs is not None
        own, rest = scores.id_logprobs[places], scores.rest_logprobs[places]
        if self._not_own is not None:
            whole = torch.cat((own, rest[:, None]), dim=1).logsumexp(dim=1)
            own, rest = own - whole[:, None], rest - whole
        found = TOPK[self.settings.distill](own, theirs.to(own.dtype), rest, their_rest.to(own.dtype))
        return scores, torch.zeros_like(scores.logprobs).index_put((places,), found)

    def _teacher_rows(self, micro: MicroBatch, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's likeliest common ids at ``places`` I[P, K] (-1: none), their log-probs, log-mass left [P]."""
        if self.teacher is not None:
            k = min(self.settings.topk, self._common.numel())
            hidden = self._hidden(micro, places)
            with torch.no_grad(), self._own_dtype():
                return self.teacher.top(hidden, k, self._not_theirs)
        if micro.teacher_ids is None or micro.teacher_id_logprobs is None:
            raise ValueError(
                f"distill = {self.settings.distill!r} with neither teacher_head nor teacher_topk; expected a teacher "
                "in process, or rollouts that servers gave top-k rows for"
            )
        ids, logprobs = micro.teacher_ids[places], micro.teacher_id_logprobs[places]
        known = self._known[torch.where((ids < 0) | (ids >= self._width), self._width, ids)]
        theirs = over_common_ids(logprobs.double(), known)
        rest = (1.0 - theirs.exp().sum(dim=1)).clamp_min(RESOLUTION).log()
        return ids.masked_fill(~known, -1), theirs, rest

    def _hidden(self, micro: MicroBatch, places: Tensor) -> Tensor:
        """The teacher's hidden states at the tokens ``places`` of a micro-batch; it reads only the rows of these."""
        assert self.teacher is not None
        rows, positions = micro.rows.touched(micro.positions[places])
        with torch.no_grad(), self._own_dtype():
            return self.teacher.response_hidden(rows, positions)

    def _score(
        self,
        hidden: Tensor,
        micro: MicroBatch,
        extra_temperature: float | None,
        *,
        ids: Tensor | None = None,
        rest: bool = False,
        excluded: Tensor | None = None,
    ) -> TokenScores:
        return score_hidden(
            self.view,
            hidden,
            micro.rows.tokens(micro.positions),
            self.settings.student_temperature,
            extra_temperature=extra_temperature,
            ids=ids,
            rest=rest,
            excluded=excluded,
        )

    def _at_common_ids(self, logits: Tensor) -> Tensor:
        count = self._common.numel()
        if count == logits.shape[1]:
            return logits
        return logits[:, :count] if self._in_front else logits[:, self._common]

    def _own_dtype(self) -> torch.autocast:
        """Without the student's autocast."""
        return torch.autocast(self.device.type, enabled=False)


def _common_ids(given: Sequence[int] | None, width: int) -> Tensor:
    """Ascending, each once, below ``width``."""
    ids = torch.arange(width) if given is None else torch.tensor(sorted(set(given)), dtype=torch.long)
    ids = ids[ids < width]
    if not ids.numel():
        raise ValueError(f"common_vocabulary has no id below {width}; expected ids that both heads have")
    return ids


def _others(common: Tensor, width: int) -> Tensor | None:
    """Ids below ``width`` that are not common, ascending; None where there is none."""
    if common.numel() == width:
        return None
    rest = torch.ones(width, dtype=torch.bool, device=common.device)
    rest[common] = False
    return rest.nonzero().squeeze(-1)
