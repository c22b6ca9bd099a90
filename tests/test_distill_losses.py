"""The distillation losses: the NumPy reference by identities, PyTorch against it and by finite differences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_ref.reference import losses as reference

seeds = st.integers(0, 2**32 - 1)
options = st.fixed_dictionaries({"causal": st.booleans(), "cosine": st.booleans()})


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def case(seed, width=12):
    """Three relations of a student and a wider teacher over two sequences, one padded on the left, one on the right."""
    rng = np.random.default_rng(seed)
    student, teacher = (tuple(normal(rng, 2, 7, w) for _ in range(3)) for w in (width, 2 * width))
    mask = np.ones((2, 7), bool)
    mask[0, :2] = mask[1, 5:] = False
    return student, teacher, mask


def test_logits_loss_of_two_classes_by_hand():
    """tau 2 turns logits (2 ln 3, 0) into probabilities (3/4, 1/4); the student says 1/2 each."""
    teacher, student = np.array([[[2 * np.log(3.0), 0]]]), np.zeros((1, 1, 2))
    expected = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    mask = np.ones((1, 1), bool)
    assert reference.logits_loss(student, teacher, mask, tau=2) == pytest.approx(expected, rel=1e-14)
    assert reference.logits_loss(student, teacher, mask, tau=2, tau_squared=True) == pytest.approx(4 * expected)


def test_relation_by_hand():
    """Width 2 in one head: products over sqrt(2); token 1 sees 0 and itself."""
    a = np.array([[1.0, 1.0], [0.0, 2.0]])
    got = reference.relations(a, np.ones(2, bool), heads=1)[0]
    e = np.exp(np.array([2.0, 4.0]) / np.sqrt(2))
    np.testing.assert_allclose(got, [[1, 0], e / e.sum()], rtol=1e-14)
    open_ = reference.relations(a, np.ones(2, bool), heads=1, causal=False)[0]
    assert open_[0, 1] == pytest.approx(0.5)  # products 2 and 2
    assert reference.relations(a, np.ones(2, bool), heads=1, cosine=True)[0, 1, 0] == pytest.approx(
        1 / (1 + np.exp(1 - np.sqrt(0.5)))
    )


@given(seeds, options)
@settings(max_examples=20)
def test_equal_relations_cost_nothing_and_others_something(seed, how):
    student, teacher, mask = case(seed)
    assert reference.attention_relation_loss(teacher, teacher, mask, heads=4, **how) == 0
    assert reference.attention_relation_loss(student, teacher, mask, heads=4, **how) > 1e-4


@given(seeds, options)
@settings(max_examples=20)
def test_the_order_of_heads_does_not_matter_and_their_split_does(seed, how):
    student, teacher, mask = case(seed)
    loss = reference.attention_relation_loss(student, teacher, mask, heads=4, **how)
    order = np.random.default_rng(seed).permutation(4)

    def permuted(qkv):
        return tuple(a.reshape(2, 7, 4, -1)[:, :, order].reshape(a.shape) for a in qkv)

    got = reference.attention_relation_loss(permuted(student), permuted(teacher), mask, heads=4, **how)
    assert got == pytest.approx(loss, rel=1e-12)
    assert reference.attention_relation_loss(student, teacher, mask, heads=2, **how) != pytest.approx(loss, rel=1e-6)


@given(seeds, options)
@settings(max_examples=20)
def test_padding_changes_nothing_and_a_later_token_only_without_causality(seed, how):
    student, teacher, mask = case(seed)
    loss = reference.attention_relation_loss(student, teacher, mask, heads=3, **how)
    padded = tuple(np.where(mask[..., None], a, 9.0) for a in student)
    assert reference.attention_relation_loss(padded, teacher, mask, heads=3, **how) == loss
    rows = reference.relations(student[0][0], mask[0], heads=3, **how)
    later = student[0][0].copy()
    later[-1] += 1
    changed = reference.relations(later, mask[0], heads=3, **how)
    assert (np.abs(changed - rows)[:, 2:-1].max() > 0) == (not how["causal"])


def test_each_relation_counts_by_its_weight():
    student, teacher, mask = case(1)
    parts = [
        reference.attention_relation_loss(student, teacher, mask, heads=2, alphas=tuple(np.eye(3)[j])) for j in range(3)
    ]
    whole = reference.attention_relation_loss(student, teacher, mask, heads=2, alphas=(1, 2, 3))
    assert whole == pytest.approx(parts[0] + 2 * parts[1] + 3 * parts[2], rel=1e-12)


def test_hidden_states_by_hand():
    """Token by token in units of the teacher's length; padding does not count."""
    teacher = [np.array([[[3.0, 4.0], [0.0, 2.0], [9.0, 9.0]]]), np.array([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])]
    student = [teacher[0] + [[[3.0, 4.0], [1.0, 0.0], [7.0, 7.0]]], teacher[1] * 0.5]
    mask = np.array([[True, True, False]])
    assert reference.hidden_state_loss(student, teacher, mask) == pytest.approx(((1 + 0.25) / 2 + 0.25) / 2, rel=1e-14)
    assert reference.hidden_state_loss(teacher, teacher, mask) == 0
    assert reference.hidden_state_loss([a * 0 for a in teacher], teacher, mask) == 1
    with pytest.raises(ValueError, match="at least one position"):
        reference.hidden_state_loss(student, teacher, mask & False)
    with pytest.raises(ValueError, match="zip"):
        reference.hidden_state_loss(student, teacher[:1], mask)


def test_input_that_has_no_loss_is_refused():
    student, teacher, mask = case(2)
    with pytest.raises(ValueError, match="at least one position"):
        reference.attention_relation_loss(student, teacher, mask & False, heads=2)
    with pytest.raises(ValueError, match="at least one position"):
        reference.logits_loss(student[0], student[1], mask & False)
    with pytest.raises(ValueError, match="must divide the width, got 5 heads and width 24"):
        reference.attention_relation_loss(student, teacher, mask, heads=5)


class TestTorch:
    """What training uses, against the reference."""

    @pytest.fixture(autouse=True)
    def _torch(self):
        self.torch = pytest.importorskip("torch", reason="training needs the extra [distill]: no torch here")
        from bitnet_ref.distill import losses

        self.losses = losses

    def tensors(self, arrays):
        return tuple(self.torch.from_numpy(a) for a in arrays)

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("cosine", [True, False])
    def test_relations(self, causal, cosine):
        for seed in range(5):
            student, teacher, mask = case(seed)
            how = {"heads": 4, "alphas": (1.0, 0.5, 2.0), "causal": causal, "cosine": cosine}
            expected = reference.attention_relation_loss(student, teacher, mask, **how)
            s, t, m = self.tensors(student), self.tensors(teacher), self.torch.from_numpy(mask)
            got = self.losses.attention_relation_loss(s, t, m, **how)
            assert got.dtype == self.torch.float32
            assert got.item() == pytest.approx(expected, rel=1e-5)
            assert self.losses.attention_relation_loss(t, t, m, **how) == 0

    @pytest.mark.parametrize("tau_squared", [True, False])
    def test_logits(self, tau_squared):
        for seed in range(5):
            rng = np.random.default_rng(seed)
            student, teacher = normal(rng, 2, 7, 33) * 3, normal(rng, 2, 7, 33) * 3
            mask = rng.random((2, 7)) < 0.5
            expected = reference.logits_loss(student, teacher, mask, tau=2.5, tau_squared=tau_squared)
            got = self.losses.logits_loss(
                *self.tensors((student, teacher, mask)), tau=2.5, tau_squared=tau_squared
            ).item()
            assert got == pytest.approx(expected, rel=1e-5)

    def test_hidden_states(self):
        for seed in range(5):
            student, _, mask = case(seed)
            teacher = case(seed + 100)[0]
            s, t, m = self.tensors(student), self.tensors(teacher), self.torch.from_numpy(mask)
            for a in (*s, *t):
                a.requires_grad_()
            got = self.losses.hidden_state_loss(s, t, m)
            assert got.dtype == self.torch.float32
            assert got.item() == pytest.approx(reference.hidden_state_loss(student, teacher, mask), rel=1e-5)
            assert self.losses.hidden_state_loss(t, t, m) == 0
            got.backward()
            assert all(a.grad is None for a in t)
            for mine, other in zip(s, t, strict=True):  # the gradient of a square
                expected = 2 * (mine - other) / other.square().sum(-1, keepdim=True) / (3 * m.sum())
                self.torch.testing.assert_close(mine.grad, (expected * m[..., None]).detach())

    def test_gradients_are_finite_differences_and_padding_has_none(self):
        """Central differences of the float64 reference along a random direction."""
        student, teacher, mask = case(3)
        s, t, m = self.tensors(student), self.tensors(teacher), self.torch.from_numpy(mask)
        for a in (*s, *t):
            a.requires_grad_()
        self.losses.attention_relation_loss(s, t, m, heads=3).backward()
        assert all(a.grad is None for a in t)
        rng, step = np.random.default_rng(4), 1e-5
        for j in range(3):
            assert self.torch.isfinite(s[j].grad).all() and (s[j].grad[~m] == 0).all()
            direction = rng.standard_normal(student[j].shape)
            values = []
            for sign in (1, -1):
                moved = list(a.astype(np.float64) for a in student)
                moved[j] = moved[j] + sign * step * direction
                values.append(reference.attention_relation_loss(tuple(moved), teacher, mask, heads=3))
            slope = (values[0] - values[1]) / (2 * step)
            assert (s[j].grad.double().numpy() * direction).sum() == pytest.approx(slope, rel=1e-4, abs=1e-7)

    def test_parts_of_a_batch_add_up(self):
        student, teacher, mask = case(5)
        s, t, m = self.tensors(student), self.tensors(teacher), self.torch.from_numpy(mask)
        n = int(mask.sum())
        losses, torch = self.losses, self.torch
        logits, targets = s[0], torch.from_numpy(np.random.default_rng(6).integers(0, 12, (2, 7)))
        targets[0, :3] = -100
        scored = int((targets[:, 1:] != -100).sum())

        def parts(function, whole, *, normaliser):
            pieces = [function(slice(i, i + 1), normaliser) for i in range(2)]
            assert sum(pieces).item() == pytest.approx(whole.item(), rel=1e-6)

        def relation(rows, normaliser):
            cut = tuple(a[rows] for a in s), tuple(a[rows] for a in t), m[rows]
            return losses.attention_relation_loss(*cut, heads=2, normaliser=normaliser)

        parts(relation, relation(slice(None), None), normaliser=n)
        parts(
            lambda rows, k: losses.hidden_state_loss(
                [a[rows] for a in s], [a[rows, :, :12] for a in t], m[rows], normaliser=k
            ),
            losses.hidden_state_loss(s, [a[:, :, :12] for a in t], m),
            normaliser=n,
        )
        parts(
            lambda rows, k: losses.logits_loss(s[0][rows], s[1][rows], m[rows], normaliser=k),
            losses.logits_loss(s[0], s[1], m),
            normaliser=n,
        )
        parts(
            lambda rows, k: losses.causal_lm_loss(logits[rows], targets[rows], normaliser=k),
            losses.causal_lm_loss(logits, targets),
            normaliser=scored,
        )

    def test_cross_entropy_predicts_the_next_token_and_skips_what_is_not_scored(self):
        logits = normal(np.random.default_rng(7), 1, 3, 5)
        labels = self.torch.tensor([[4, -100, 2]])
        p = np.exp(logits[0, 1].astype(np.float64))
        got = self.losses.causal_lm_loss(self.torch.from_numpy(logits), labels).item()
        assert got == pytest.approx(-np.log(p[2] / p.sum()), rel=1e-5)
        with pytest.raises(ValueError, match="at least one position"):
            self.losses.causal_lm_loss(self.torch.from_numpy(logits), self.torch.full((1, 3), -100))

    def test_under_autocast_the_sums_stay_float32(self):
        student, teacher, mask = case(8)
        s, t, m = self.tensors(student), self.tensors(teacher), self.torch.from_numpy(mask)
        with self.torch.autocast("cpu", self.torch.bfloat16):
            got = self.losses.attention_relation_loss(s, t, m, heads=2).item()
        assert got == self.losses.attention_relation_loss(s, t, m, heads=2).item()
