"""Outputs of a teacher on disk: the losses are those of the teacher itself, within the rounding that is stated."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra [distill]")
transformers = pytest.importorskip("transformers", reason="needs the extra [distill]")

from torch.nn import functional  # noqa: E402

from bitnet_ref.distill import synthetic  # noqa: E402
from bitnet_ref.distill.losses import attention_relation_loss, logits_loss  # noqa: E402
from bitnet_ref.distill.tasks import ClassificationTask, TextTask, batches, collate  # noqa: E402
from bitnet_ref.distill.teacher_cache import LiveTeacher, TeacherCache, coarsen  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

V, TAU = 60, 5.0


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors here are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Scored(torch.nn.Module):
    """A model that gives logits at some positions."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=V,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
        self.model = transformers.LlamaForCausalLM(config).eval()
        self.calls = 0

    def forward(self, input_ids, attention_mask, positions):
        self.calls += 1
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits[positions]


def answers(attention_mask, labels):
    return functional.pad(labels[:, 1:] != -100, (0, 1))


def everywhere(attention_mask, labels):
    return attention_mask.bool()


def nowhere(attention_mask, labels):
    return torch.zeros_like(attention_mask, dtype=torch.bool)


def made_rows(n=40, seed=0):
    """Rows of different lengths whose last token is the label."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        ids = rng.integers(0, V, rng.integers(3, 12))
        labels = np.full(len(ids), -100)
        labels[-1] = ids[-1]
        rows.append((ids, labels))
    return rows


def batch_of(rows):
    return {name: torch.from_numpy(value) for name, value in collate(rows).items()}


def cached(tmp_path, rows, positions=answers, scored=None, layer=1, **more):
    scored = scored or Scored()
    teacher = LiveTeacher(scored, layer)
    try:
        return TeacherCache(tmp_path, teacher, rows, positions, **more)
    finally:
        teacher.close()


def live(scored, batch, positions, layer=1):
    teacher = LiveTeacher(scored, layer)
    try:
        return teacher.outputs(
            batch["input_ids"], batch["attention_mask"], positions(batch["attention_mask"], batch["labels"])
        )
    finally:
        teacher.close()


def ask(cache, batch, positions):
    compared = positions(batch["attention_mask"], batch["labels"])
    return cache.outputs(batch["input_ids"], batch["attention_mask"], compared)


def ld(student, outputs):
    mask = torch.ones(1, len(student), dtype=torch.bool)
    if outputs.indices is not None:
        student = coarsen(student, outputs.indices, TAU)
    return logits_loss(student[None], outputs.logits[None], mask, tau=TAU).item()


def ad(student, outputs, batch):
    return attention_relation_loss(student, outputs.relations, batch["attention_mask"].bool(), heads=4).item()


@pytest.mark.parametrize("positions", [answers, everywhere])
@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8), ("float32", 24)])
def test_losses_from_the_cache_are_those_of_the_teacher_within_its_rounding(tmp_path, positions, dtype, bits):
    rows, scored = made_rows(), Scored()
    cache = cached(tmp_path, rows, positions, scored, dtype=dtype)
    # Another choice and order than that in which the cache was made, so other paddings too.
    batch = batch_of([rows[i] for i in (31, 2, 17, 5, 5, 39)])
    stored, fresh = ask(cache, batch, positions), live(scored, batch, positions)
    n = int(positions(batch["attention_mask"], batch["labels"]).sum())
    assert stored.logits.shape == fresh.logits.shape == (n, V) and stored.logits.dtype == torch.float32
    rng = torch.Generator().manual_seed(1)
    student = fresh.logits + 3 * torch.randn(n, V, generator=rng)

    # Rounding moves a logit by up to |z| 2^-bits; the divergence moves by at most that, over tau, times the mean
    # distance of log p - log q from its mean, which is below twice its largest value.
    epsilon = 2.0**-bits * float(fresh.logits.abs().max()) + 1e-5
    log_ratio = (fresh.logits / TAU).log_softmax(-1) - (student / TAU).log_softmax(-1)
    bound = 2 * epsilon / TAU * float(log_ratio.abs().max()) + 1e-6
    assert (stored.logits - fresh.logits).abs().max() <= epsilon
    assert abs(ld(student, stored) - ld(student, fresh)) <= bound

    # Relations: the same loss as with the teacher's tensors rounded in the same way.
    others = tuple(x + 0.5 * torch.randn(x.shape, generator=rng) for x in fresh.relations)
    rounded = fresh._replace(relations=tuple(x.to(getattr(torch, dtype)).float() for x in fresh.relations))
    assert ad(others, stored, batch) == pytest.approx(ad(others, rounded, batch), rel=2e-3 if bits < 24 else 1e-4)
    assert ad(others, fresh, batch) > 0.05  # the comparison is not one of zeros


@pytest.mark.parametrize("top_k", [1, 8, V - 2])
def test_top_k_is_the_divergence_of_lumped_distributions(tmp_path, top_k):
    rows, scored = made_rows(), Scored()
    cache = cached(tmp_path, rows, everywhere, scored, dtype="float32", top_k=top_k, tau=TAU)
    batch = batch_of(rows[:6])
    stored, fresh = ask(cache, batch, everywhere), live(scored, batch, everywhere)
    student = fresh.logits + 3 * torch.randn(fresh.logits.shape, generator=torch.Generator().manual_seed(1))
    assert stored.logits.shape == (len(student), top_k + 1) and stored.indices.shape == (len(student), top_k)
    # In NumPy, from the definition.
    p, q = (torch.softmax(x.double() / TAU, -1).numpy() for x in (fresh.logits, student))
    expected = 0.0
    for i, chosen in enumerate(stored.indices.numpy()):
        assert set(chosen) == set(np.argsort(-p[i])[:top_k])
        kept = np.append(p[i][chosen], 1 - p[i][chosen].sum()), np.append(q[i][chosen], 1 - q[i][chosen].sum())
        expected += float(np.sum(kept[0] * np.log(kept[0] / kept[1]))) / len(p)
    assert ld(student, stored) == pytest.approx(expected, rel=1e-4)
    # Lumping loses information, and nothing else.
    assert ld(student, stored) <= ld(student, fresh) + 1e-6
    assert ld(fresh.logits, stored) == pytest.approx(0, abs=1e-6)
    if top_k == V - 2:
        assert ld(student, stored) == pytest.approx(ld(student, fresh), rel=0.2)


def test_gradients_reach_every_logit_of_a_student():
    logits = torch.randn(3, V, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 5], [7, 1], [59, 58]])
    coarse = coarsen(logits, indices, TAU)
    coarse[:, -1].sum().backward()
    assert (logits.grad.scatter(1, indices, 1) > 0).all() and (logits.grad.gather(1, indices) == 0).all()
    total = torch.logsumexp(coarse.detach().double() / TAU, 1)
    torch.testing.assert_close(total, torch.logsumexp(logits.detach() / TAU, 1), rtol=1e-6, atol=1e-6)


def test_a_whole_training_is_served(tmp_path):
    """Every batch of a task, in any cut of it, at any padding."""
    tokenizer = synthetic.tokenizer()
    examples = synthetic.sentences(40, 0)
    data = batches(ClassificationTask(synthetic.TEMPLATE, synthetic.LABELS, 64), tokenizer, examples, 8, 0)
    scored = Scored()
    scored.model.resize_token_embeddings(tokenizer.get_vocab_size())
    cache = cached(tmp_path, data.rows, answers, scored)
    calls = scored.calls
    for step in range(12):
        whole = {name: torch.from_numpy(value) for name, value in data.batch(step).items()}
        for part in ({n: v[i::2] for n, v in whole.items()} for i in range(2)):
            stored, fresh = ask(cache, part, answers), live(scored, part, answers)
            torch.testing.assert_close(stored.logits, fresh.logits, rtol=1e-3, atol=1e-3)
            mask = part["attention_mask"].bool()[..., None]
            for a, b in zip(stored.relations, fresh.relations, strict=True):
                torch.testing.assert_close(a, b * mask, rtol=1e-3, atol=1e-3)
    assert scored.calls == calls + 24  # only ours
    with pytest.raises(LookupError, match=r"must have every row of a batch, .* and 1 compared positions"):
        ask(cache, batch_of([(np.array([1, 2, 3]), np.array([-100, -100, 3]))]), answers)
    with pytest.raises(LookupError, match="compared positions"):
        ask(cache, whole, everywhere)


def test_what_is_not_compared_is_not_kept(tmp_path):
    rows = [(ids, np.full_like(ids, -100)) for ids, _ in made_rows()]
    cache = cached(tmp_path, rows, nowhere)
    tokens = sum(len(ids) for ids, _ in rows)
    assert cache.n_bytes == tokens * 2 * (32 + 16 + 16)
    stored = ask(cache, batch_of(rows[:4]), nowhere)
    assert len(stored.logits) == 0 and len(stored.relations) == 3
    without = cached(tmp_path, made_rows(), answers, layer=None)
    assert without.n_bytes == 40 * 2 * V
    assert ask(without, batch_of(made_rows()[:4]), answers).relations == ()


def test_the_size_is_said_before_anything_is_written(tmp_path):
    rows, said = made_rows(), []
    tokens = sum(len(ids) for ids, _ in rows)
    n_bytes = tokens * 2 * (V + 32 + 16 + 16)
    with pytest.raises(ValueError, match=f"may take 1,000 bytes, they would take {n_bytes:,} \\({tokens} tokens"):
        cached(tmp_path, rows, everywhere, limit_bytes=1000, say=said.append)
    assert list(tmp_path.iterdir()) == []
    assert f"{n_bytes:,} bytes" in said[0] and f"{n_bytes:,} are to be written" in said[0]
    cache = cached(tmp_path, rows, everywhere, limit_bytes=n_bytes)
    assert cache.n_bytes == n_bytes
    on_disk = sum(path.stat().st_size for path in cache.path.iterdir())
    assert n_bytes <= on_disk < n_bytes + 2000
    # 60 logits of two bytes become 8 of two bytes, their numbers of four, and the rest.
    assert cached(tmp_path, rows, everywhere, top_k=8).n_bytes == tokens * (8 * 6 + 4 + 2 * (32 + 16 + 16))


def test_equal_rows_are_kept_once(tmp_path):
    rows = made_rows()
    assert cached(tmp_path, rows * 3).path == cached(tmp_path, rows).path
    assert cached(tmp_path, rows * 3).n_rows == 40


def test_other_teachers_rows_and_settings_are_other_caches(tmp_path):
    rows = made_rows()
    paths = {
        cached(tmp_path, rows, **more).path
        for more in ({}, {"scored": Scored(1)}, {"layer": 0}, {"dtype": "bfloat16"}, {"top_k": 4})
    }
    paths |= {cached(tmp_path, rows, top_k=4, tau=2.0).path, cached(tmp_path, rows[1:]).path}
    paths |= {cached(tmp_path, rows, everywhere).path}
    assert len(paths) == 8
    assert cached(tmp_path, rows, tau=2.0).path in paths  # of no matter without the rest


def test_a_cut_run_goes_on_behind_its_last_shard(tmp_path, monkeypatch):
    monkeypatch.setattr("bitnet_ref.distill.teacher_cache._SHARD_BYTES", 4000)
    rows = made_rows()
    whole = cached(tmp_path / "whole", rows, everywhere)
    shards = sorted(path.name for path in whole.path.iterdir())
    assert len(shards) > 5

    class Full(Scored):
        def forward(self, *arguments):
            if self.calls == 4:
                raise KeyboardInterrupt
            return super().forward(*arguments)

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "cut", rows, everywhere, Full())
    left = sorted(path.name for path in next((tmp_path / "cut").iterdir()).iterdir())
    assert left == shards[:3]
    scored, said = Scored(), []
    again = cached(tmp_path / "cut", rows, everywhere, scored, say=said.append)
    assert scored.calls == 1 + len(shards) - 3 and again.path.name == whole.path.name
    for name in shards:
        assert (again.path / name).read_bytes() == (whole.path / name).read_bytes()
    batch = batch_of(rows)
    torch.testing.assert_close(ask(again, batch, everywhere).logits, ask(whole, batch, everywhere).logits)


def test_a_full_disk_is_one_error_and_leaves_no_partial_file(tmp_path, monkeypatch):
    from pathlib import Path

    rows = made_rows()
    written = Path.write_bytes

    def full(self, data):
        written(self, data[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match=r"of the teacher's outputs could not be written: .*No space left"):
            cached(tmp_path, rows)
    (folder,) = tmp_path.iterdir()
    assert list(folder.iterdir()) == []
    usage = type("Usage", (), {"free": 10})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage)
        with pytest.raises(OSError, match=r"take [\d,]+ bytes, the disk of .* has 10 free"):
            cached(tmp_path, rows)


def test_a_broken_shard_is_named(tmp_path):
    rows = made_rows()
    path = next(cached(tmp_path, rows).path.iterdir())
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(OSError, match="must be a whole shard, delete it to have it made again"):
        ask(cached(tmp_path, rows), batch_of(rows[:2]), answers)


def test_values_must_fit_the_type(tmp_path):
    scored = Scored()
    with torch.no_grad():
        scored.model.lm_head.weight.mul_(1e5)
    with pytest.raises(ValueError, match=r"must be finite in torch.float16, the largest is \S+: choose bfloat16"):
        cached(tmp_path, made_rows(), scored=scored)
    assert cached(tmp_path, made_rows(), scored=scored, dtype="bfloat16").n_rows == 40


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([], {}, "at least one row"),
        (None, {"dtype": "int8"}, "dtype must be one of float16, bfloat16, float32, got 'int8'"),
        (None, {"top_k": -1}, "top_k must not be negative"),
        (None, {"tau": 0}, "tau must be positive"),
        (None, {"top_k": V - 1}, f"top_k must leave at least two tokens of {V} to the rest"),
    ],
)
def test_bad_settings_are_refused(tmp_path, rows, more, message):
    with pytest.raises(ValueError, match=message):
        cached(tmp_path, made_rows() if rows is None else rows, **more)


def test_text_rows_are_compared_everywhere(tmp_path):
    tokenizer = synthetic.tokenizer()
    examples = [synthetic.Example((text,)) for text in synthetic.texts(12, 0)]
    data = batches(TextTask(max_length=40), tokenizer, examples, 4, 0)
    scored = Scored()
    scored.model.resize_token_embeddings(tokenizer.get_vocab_size())
    cache = cached(tmp_path, data.rows, everywhere, scored, top_k=16)
    batch = {name: torch.from_numpy(value) for name, value in data.batch(1).items()}
    assert ask(cache, batch, everywhere).logits.shape == (int(batch["attention_mask"].sum()), 17)
