"""Every method's two numbers on groups worked out by hand, and the registry that users extend."""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scope_opd.objective import methods
from scope_opd.objective.methods import Credit, Group, RowError, build_method, group_advantage, method_names, register

LAW = settings(max_examples=60, deadline=None, derandomize=True)
LN2, LN3, LN4, LN6 = math.log(2), math.log(3), math.log(4), math.log(6)
NAN = math.nan
R, W = True, False


def group(
    correct: list[bool],
    student: list[float] | None = None,
    teacher: list[float] | None = None,
    *,
    rewards: list[float] | None = None,
    scored: list[bool] | None = None,
    masked: list[bool] | None = None,
    lengths: list[int] | None = None,
) -> Group:
    n = len(correct)
    teacher = teacher if teacher is not None else [1.0] * n
    return Group(
        rewards=torch.tensor(rewards if rewards is not None else [float(c) for c in correct], dtype=torch.float64),
        correct=torch.tensor(correct, dtype=torch.bool),
        nll_student=torch.tensor(student if student is not None else [1.0] * n, dtype=torch.float64),
        nll_teacher=torch.tensor(teacher, dtype=torch.float64),
        scored=torch.tensor(scored if scored is not None else [not math.isnan(t) for t in teacher], dtype=torch.bool),
        lengths=torch.tensor(lengths if lengths is not None else [5] * n),
        masked=torch.tensor(masked if masked is not None else [False] * n, dtype=torch.bool),
    )


def numbers(credit: Credit) -> tuple[list[float], list[float], list[bool]]:
    return credit.reinforce.tolist(), credit.distill.tolist(), credit.masked.tolist()


def assert_credit(credit: Credit, reinforce: list[float], distill: list[float], masked: list[bool]) -> None:
    assert credit.reinforce.tolist() == pytest.approx(reinforce, rel=1e-13, abs=0)
    assert credit.distill.tolist() == pytest.approx(distill, rel=1e-13, abs=0)
    assert credit.masked.tolist() == masked


# One group for all: correct with PPL_S 2 and 6, wrong with PPL_T 2, 3, 6. What the other model thinks is set to values
# that would show at once if they were read.
MIXED = group([R, W, R, W, W], student=[LN2, 40.0, LN6, 41.0, 42.0], teacher=[NAN, LN2, NAN, LN3, LN6])
NO_MASK = [False] * 5
#            settings                                            w_stu of PPL 2, 6   w_tea of PPL 2, 3, 6
SCOPE_BY_HAND = [
    ({}, (2 / 8, 6 / 8), (3 / 6, 2 / 6, 1 / 6)),
    ({"tau": 0.5}, (4 / 40, 36 / 40), (9 / 14, 4 / 14, 1 / 14)),
    ({"tau": 2.0}, (1 / (1 + math.sqrt(3)), math.sqrt(3) / (1 + math.sqrt(3))),
     tuple(v / (math.sqrt(3) + math.sqrt(2) + 1) for v in (math.sqrt(3), math.sqrt(2), 1.0))),
    ({"scale": "mean"}, (2 * 2 / 8, 2 * 6 / 8), (3 * 3 / 6, 3 * 2 / 6, 3 * 1 / 6)),
    ({"student_weight": "inverse_ppl"}, (6 / 8, 2 / 8), (3 / 6, 2 / 6, 1 / 6)),
    ({"teacher_weight": "ppl"}, (2 / 8, 6 / 8), (2 / 11, 3 / 11, 6 / 11)),
    ({"student_weight": "uniform"}, (1 / 2, 1 / 2), (3 / 6, 2 / 6, 1 / 6)),
    ({"teacher_weight": "uniform"}, (2 / 8, 6 / 8), (1 / 3, 1 / 3, 1 / 3)),
    ({"student_weight": "uniform", "teacher_weight": "uniform", "scale": "mean"}, (1.0, 1.0), (1.0, 1.0, 1.0)),
    # w = n softmax(-NLL) on both paths (as_released); n softmax(-NLL_S), n softmax(+NLL_T) (as_documented)
    ({"student_weight": "inverse_ppl", "teacher_weight": "inverse_ppl", "scale": "mean"},
     (2 * 6 / 8, 2 * 2 / 8), (3 * 3 / 6, 3 * 2 / 6, 3 * 1 / 6)),
    ({"student_weight": "inverse_ppl", "teacher_weight": "ppl", "scale": "mean"},
     (2 * 6 / 8, 2 * 2 / 8), (3 * 2 / 11, 3 * 3 / 11, 3 * 6 / 11)),
]  # fmt: skip


@pytest.mark.parametrize(("settings_", "student", "teacher"), SCOPE_BY_HAND)
def test_scope_weights_both_paths_as_worked_out_by_hand(
    settings_: dict[str, float | str], student: tuple[float, ...], teacher: tuple[float, ...]
) -> None:
    credit = build_method("scope", settings_).credit(MIXED)
    assert_credit(credit, [student[0], 0, student[1], 0, 0], [0, teacher[0], 0, teacher[1], teacher[2]], masked=NO_MASK)


def test_scope_masks_unscored_wrong_rollouts_and_normalises_over_the_rest() -> None:
    # The wrong rollout with PPL_T 3 has no score: 1/2 : 1/6 = 3 : 1 remain.
    holes = group([R, W, R, W, W], student=[LN2, 40.0, LN6, 41.0, 42.0], teacher=[NAN, LN2, NAN, NAN, LN6])
    assert_credit(
        build_method("scope").credit(holes), [1 / 4, 0, 3 / 4, 0, 0], [0, 3 / 4, 0, 0, 1 / 4],
        [False, False, False, True, False],
    )  # fmt: skip


def test_scope_leaves_masked_members_out_of_the_weights_and_never_reads_their_numbers() -> None:
    masked = group(
        [R, R, R, W, W], student=[LN2, NAN, LN6, NAN, 1.0], teacher=[NAN, NAN, NAN, NAN, 2.0],
        rewards=[1, NAN, 1, NAN, 0], scored=[False, True, False, True, True], masked=[False, True, False, True, False],
    )  # fmt: skip
    assert_credit(
        build_method("scope").credit(masked), [2 / 8, 0, 6 / 8, 0, 0], [0, 0, 0, 0, 1],
        [False, True, False, True, False],
    )  # fmt: skip


def test_scope_ignores_a_teacher_score_of_a_correct_rollout() -> None:
    both = group([R, W, R, W, W], student=[LN2, 40.0, LN6, 41.0, 42.0], teacher=[0.1, LN2, 9.0, LN3, LN6])
    assert numbers(build_method("scope").credit(both)) == numbers(build_method("scope").credit(MIXED))


def test_scope_on_groups_all_correct_all_wrong_of_one_and_all_masked() -> None:
    scope = build_method("scope")
    assert_credit(scope.credit(group([R, R, R], [LN2, LN2, LN4])), [1 / 4, 1 / 4, 2 / 4], [0, 0, 0], [False] * 3)
    assert_credit(scope.credit(group([W, W], teacher=[LN2, LN6])), [0, 0], [3 / 4, 1 / 4], [False] * 2)
    assert_credit(scope.credit(group([R], [7.0])), [1], [0], [False])
    assert_credit(scope.credit(group([W], teacher=[7.0])), [0], [1], [False])
    assert_credit(scope.credit(group([W], teacher=[NAN])), [0], [0], [True])
    assert_credit(scope.credit(group([R, W], masked=[True, True])), [0, 0], [0, 0], [True, True])


def test_weights_do_not_depend_on_lengths() -> None:
    short = group([R, R], [LN2, LN6], lengths=[1, 1])
    long = group([R, R], [LN2, LN6], lengths=[1, 4000])
    assert numbers(build_method("scope").credit(short)) == numbers(build_method("scope").credit(long))


def test_scope_at_infinite_tau_and_with_uniform_weights_is_dual_path() -> None:
    for scale in ("sum", "mean"):
        expected = numbers(build_method("dual_path", {"scale": scale}).credit(MIXED))
        uniform = {"student_weight": "uniform", "teacher_weight": "uniform", "scale": scale}
        assert numbers(build_method("scope", uniform).credit(MIXED)) == expected
        for tau, tolerance in ((1e12, 1e-9), (math.inf, 1e-15)):
            credit = build_method("scope", {"tau": tau, "scale": scale}).credit(MIXED)
            assert credit.reinforce.tolist() == pytest.approx(expected[0], rel=tolerance)
            assert credit.distill.tolist() == pytest.approx(expected[1], rel=tolerance)


def test_dual_path_gives_every_rollout_of_a_path_the_same_share() -> None:
    assert_credit(
        build_method("dual_path").credit(MIXED), [1 / 2, 0, 1 / 2, 0, 0], [0, 1 / 3, 0, 1 / 3, 1 / 3], NO_MASK
    )
    assert_credit(build_method("dual_path", {"scale": "mean"}).credit(MIXED), [1, 0, 1, 0, 0], [0, 1, 0, 1, 1], NO_MASK)


def test_opd_distills_every_scored_rollout_and_masks_the_others() -> None:
    mixed = group([R, W, W, R], teacher=[1.0, 2.0, NAN, 3.0], masked=[False, False, False, True])
    assert_credit(build_method("opd").credit(mixed), [0, 0, 0, 0], [1, 1, 0, 0], [False, False, True, True])


def test_positive_reinforces_the_correct_alone_and_keeps_the_wrong_in_the_batch() -> None:
    credit = build_method("positive").credit(group([R, W, R], teacher=[NAN] * 3, masked=[False, False, True]))
    assert_credit(credit, [1, 0, 0], [0, 0, 0], [False, False, True])


def test_kd_reinforces_whatever_the_teacher_sampled() -> None:
    credit = build_method("kd").credit(group([R, W, W], teacher=[NAN] * 3, masked=[False, False, True]))
    assert_credit(credit, [1, 1, 0], [0, 0, 0], [False, False, True])


# GRPO as verl publishes it: (R - mean) / (torch.std + 1e-6), torch.std being the sample deviation.
#   [1,0,0,1]: mean 1/2, squares 4 * 1/4 = 1, std sqrt(1/3)       -> +-(1/2) / (sqrt(1/3) + 1e-6)
#   [1,0,0]:   mean 1/3, squares 4/9 + 1/9 + 1/9 = 2/3, std sqrt(1/3) -> 2/3 and -1/3 over the same
#   [-1,1]:    mean 0, squares 2, std sqrt 2                      -> -+1 / (sqrt 2 + 1e-6)
#   [0.5,1,3]: mean 3/2, squares 1 + 1/4 + 9/4 = 7/2, std sqrt(7/4)
GRPO_BY_HAND = [
    ([1, 0, 0, 1], [0.5, -0.5, -0.5, 0.5], math.sqrt(1 / 3)),
    ([1, 0, 0], [2 / 3, -1 / 3, -1 / 3], math.sqrt(1 / 3)),
    ([-1, 1], [-1, 1], math.sqrt(2)),
    ([0.5, 1, 3], [-1, -0.5, 1.5], math.sqrt(7 / 4)),
]


@pytest.mark.parametrize(("rewards", "centred", "deviation"), GRPO_BY_HAND)
def test_grpo_advantage_is_the_published_formula_worked_out_by_hand(
    rewards: list[float], centred: list[float], deviation: float
) -> None:
    credit = build_method("grpo").credit(group([r > 0.5 for r in rewards], rewards=rewards))
    expected = [value / (deviation + 1e-6) for value in centred]
    assert_credit(credit, expected, [0] * len(rewards), [False] * len(rewards))


def test_grpo_leaves_masked_members_out_of_mean_and_deviation() -> None:
    # Live rewards [1, 0, 0]; the masked 1 and NaN would change both.
    credit = build_method("grpo").credit(
        group([R, R, W, W, W], rewards=[1, 1, 0, NAN, 0], masked=[False, True, False, True, False])
    )
    scale = math.sqrt(1 / 3) + 1e-6
    assert_credit(
        credit, [2 / 3 / scale, 0, -1 / 3 / scale, 0, -1 / 3 / scale], [0] * 5, [False, True, False, True, False]
    )


@pytest.mark.parametrize("rewards", [[1.0], [0.1] * 7, [0.0, 0.0], [1 / 3] * 3, []])
def test_grpo_advantage_of_one_rollout_or_without_spread_is_exactly_zero(rewards: list[float]) -> None:
    assert group_advantage(torch.tensor(rewards, dtype=torch.float64)).tolist() == [0.0] * len(rewards)


def test_grpo_group_left_with_one_by_masking_has_zero_advantage_and_stays_in_the_batch() -> None:
    credit = build_method("grpo").credit(group([R, W], masked=[False, True]))
    assert_credit(credit, [0, 0], [0, 0], [False, True])


@LAW
@given(st.lists(st.floats(-10, 10), min_size=2, max_size=9))
def test_grpo_advantages_add_to_zero_and_keep_the_order_of_the_rewards(rewards: list[float]) -> None:
    advantage = group_advantage(torch.tensor(rewards, dtype=torch.float64)).tolist()
    assert sum(advantage) == pytest.approx(0.0, abs=1e-6)
    for i in range(len(rewards)):
        for j in range(len(rewards)):
            if rewards[i] <= rewards[j]:
                assert advantage[i] <= advantage[j]


def test_reward_opd_is_the_advantage_of_the_scored_plus_beta() -> None:
    # Rollout 3 has no score: the advantage is over rewards [1, 0, 0], as above.
    credit = build_method("reward_opd", {"beta": 0.25}).credit(group([R, W, W, R], teacher=[1.0, 2.0, 3.0, NAN]))
    scale = math.sqrt(1 / 3) + 1e-6
    assert_credit(
        credit, [2 / 3 / scale, -1 / 3 / scale, -1 / 3 / scale, 0], [0.25, 0.25, 0.25, 0], [False, False, False, True]
    )


#          teacher asked for    (correct, wrong)  sampled by  aggregation  clip  dual clip
PUBLISHED = {
    "scope": ((False, True), "student", "prompt", None, None),
    "dual_path": ((False, True), "student", "prompt", None, None),
    "opd": ((True, True), "student", "token", None, None),
    "grpo": ((False, False), "student", "token", 0.2, 3.0),
    "positive": ((False, False), "student", "token", None, None),
    "kd": ((False, False), "teacher", "token", None, None),
    "reward_opd": ((True, True), "student", "token", None, None),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_method_declares_teacher_sampler_aggregation_and_clips_as_published(name: str) -> None:
    method = build_method(name)
    asked = (method.needs_teacher(True), method.needs_teacher(False))
    assert (asked, method.sampled_by, method.aggregation, method.clip, method.dual_clip) == PUBLISHED[name]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
@LAW
@given(data=st.data())
def test_credit_is_permutation_equivariant_zero_where_masked_and_one_sided_by_path(name: str, data) -> None:
    n = data.draw(st.integers(1, 8))
    flags = st.lists(st.booleans(), min_size=n, max_size=n)
    values = st.lists(st.floats(0.0, 30.0), min_size=n, max_size=n)
    correct, scored, masked = data.draw(flags), data.draw(flags), data.draw(flags)
    student, teacher = data.draw(values), data.draw(values)
    order = data.draw(st.permutations(range(n)))

    def arranged(index: list[int]) -> Group:
        return group(
            [correct[i] for i in index], [student[i] for i in index], [teacher[i] for i in index],
            scored=[scored[i] for i in index], masked=[masked[i] for i in index],
        )  # fmt: skip

    credit = build_method(name).credit(arranged(list(range(n))))
    permuted = build_method(name).credit(arranged(order))
    assert permuted.reinforce.tolist() == pytest.approx(credit.reinforce[order].tolist(), rel=1e-10, abs=1e-12)
    assert permuted.distill.tolist() == pytest.approx(credit.distill[order].tolist(), rel=1e-10, abs=1e-12)
    assert permuted.masked.tolist() == credit.masked[order].tolist()
    assert not bool(credit.reinforce[credit.masked].any())
    assert not bool(credit.distill[credit.masked].any())
    assert bool((credit.masked | ~torch.tensor(masked)).all())
    assert bool(torch.isfinite(credit.reinforce + credit.distill).all())
    if name in ("scope", "dual_path"):
        live_right = torch.tensor(correct) & ~torch.tensor(masked)
        live_wrong = ~torch.tensor(correct) & ~torch.tensor(masked) & torch.tensor(scored)
        assert torch.equal(credit.reinforce > 0, live_right)
        assert torch.equal(credit.distill > 0, live_wrong)
        assert float(credit.reinforce.sum()) == pytest.approx(float(live_right.any()), rel=1e-12)
        assert float(credit.distill.sum()) == pytest.approx(float(live_wrong.any()), rel=1e-12)


@pytest.mark.parametrize(
    ("field", "values"),
    [("rewards", [0, NAN]), ("student", [1.0, math.inf]), ("teacher", [1.0, NAN])],
)
def test_number_that_is_not_finite_in_a_live_row_is_an_error_with_its_row(field: str, values: list[float]) -> None:
    with pytest.raises(RowError, match="row 1") as caught:
        group([W, W], **{field: values}, scored=[True, True])  # type: ignore[arg-type]
    assert caught.value.row == 1


def test_group_of_differing_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match="lengths has shape"):
        group([R, W], lengths=[1])


@pytest.mark.parametrize("settings_", [{"tau": 0.0}, {"tau": -1}, {"tau": NAN}, {"student_weight": "up"},
                                       {"teacher_weight": "down"}, {"scale": "max"}])  # fmt: skip
def test_bad_settings_are_refused_before_any_rollout(settings_: dict[str, float | str]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings_)).split("_")[-1].replace("weight", "direction")):
        build_method("scope", settings_)


def test_pool_of_settings_may_hold_what_other_methods_declare_but_own_settings_may_not() -> None:
    pool = {"tau": 0.5, "scale": "mean", "beta": 2.0, "no_such": 1}
    assert build_method("scope", pool).tau == 0.5  # type: ignore[attr-defined]
    assert build_method("grpo", pool) == methods.Grpo()
    with pytest.raises(ValueError, match="'grpo' has no setting 'tau'"):
        build_method("grpo", {}, tau=1.0)
    with pytest.raises(ValueError, match=r"'scope' has no setting 'taw'; expected .*tau"):
        build_method("scope", {}, taw=1.0)
    assert build_method("scope", {"tau": 0.5}, tau=3.0).tau == 3.0  # type: ignore[attr-defined]


def test_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="method = 'scop'; expected one of dual_path, grpo, kd, opd, positive"):
        build_method("scop")


def test_no_room_of_the_method_branches_on_a_methods_name() -> None:
    # The demo and the report name the methods that they show; everything else learns nothing of which one runs.
    root = Path(methods.__file__).parent.parent
    found = set()
    for path in root.rglob("*.py"):
        if path.relative_to(root).parts[0] in ("cli", "report"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Compare, ast.match_case)):
                inside = ast.walk(node if isinstance(node, ast.Compare) else node.pattern)
                names = {leaf.value for leaf in inside if isinstance(leaf, ast.Constant)} & set(method_names())
                found |= {(path.name, name) for name in names}
    assert not found


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))


@dataclass(frozen=True)
class Shortest(methods.MethodDefaults):
    """A user's method: reinforces the shortest correct rollout."""

    sampled_by: ClassVar[str] = "student"
    aggregation: ClassVar[str] = "sequence"
    clip: ClassVar[float | None] = None
    dual_clip: ClassVar[float | None] = None
    strength: float = 1.0

    def needs_teacher(self, correct: bool) -> bool:
        return False

    def credit(self, group: Group) -> Credit:
        reinforce = torch.zeros(group.rewards.shape, dtype=torch.float64)
        eligible = group.live & group.correct
        if bool(eligible.any()):
            best = torch.where(eligible, group.lengths, group.lengths.max() + 1).argmin()
            reinforce[best] = self.strength
        return Credit(reinforce, torch.zeros_like(reinforce), group.masked)


@pytest.mark.usefixtures("registry")
def test_registered_method_of_a_user_is_built_by_name_with_its_own_settings() -> None:
    assert register("shortest")(Shortest) is Shortest
    assert "shortest" in method_names()
    method = build_method("shortest", {"tau": 2.0}, strength=3.0)
    assert_credit(method.credit(group([W, R, R], lengths=[1, 9, 4])), [0, 0, 3], [0, 0, 0], [False] * 3)
    assert method.aggregation == "sequence"


@pytest.mark.usefixtures("registry")
def test_taken_names_and_classes_that_are_no_method_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'scope' is already registered by scope_opd\.objective\.methods\.Scope"):
        register("scope")(Shortest)
    same_name = type("Scope", (Shortest,), {"__module__": "elsewhere", "__qualname__": "Scope"})
    with pytest.raises(ValueError, match="already registered"):
        register("scope")(same_name)
    register("scope")(methods.Scope)  # a module loaded again registers its own class again
    with pytest.raises(ValueError, match=r"expected a dataclass with .*needs_teacher"):
        register("bare")(dataclass(type("Bare", (), {"credit": lambda self, group: None})))
    parts = ("credit", "needs_teacher", "sampled_by", "aggregation", "clip", "dual_clip", "smallest_group")
    plain = type("Plain", (), {part: getattr(Shortest, part) for part in parts})
    with pytest.raises(ValueError, match="expected a dataclass"):
        register("plain")(plain)
    assert "bare" not in method_names()
    assert "plain" not in method_names()
