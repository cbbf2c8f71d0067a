import measure
import pytest
import torch
from inputs import ROWS, Batch, load_batch, save_batch
from measure import Job, peak_growth, run
from peers import PEERS, Peer, full_logits, tvkd
from reference import reference_file, save_references

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    """A tiny batch and its float64 run."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(ROWS, 17, 16), torch.randn(50, 16)
    labels = torch.randint(50, (ROWS, 16))
    save_batch(Batch("tiny", hidden, weight, labels), [64], tmp_path / "batch.pt")
    save_references(tmp_path, [64], "cpu")
    return tmp_path


class Sent(list):
    """Stands for the pipe to the parent process."""

    send = list.append


@pytest.mark.parametrize("megabytes", [30, 300])
def test_peak_growth_sees_a_known_allocation(megabytes):
    def call():
        torch.ones(megabytes * 250_000)

    assert peak_growth(call, CPU) == pytest.approx(megabytes * 1e6, rel=0.02, abs=2e6)


def test_peak_growth_sees_small_blocks_after_earlier_ones_were_freed():
    def call():
        blocks = [torch.ones(500_000) for _ in range(50)]  # 2 MB each, 100 MB together
        del blocks

    call()
    assert peak_growth(call, CPU) == pytest.approx(100e6, rel=0.05)


def test_sampled_peak_agrees(monkeypatch):
    monkeypatch.setattr(measure, "_reset_high_water_mark", lambda: False)

    def call():
        block = torch.ones(75_000_000)
        for _ in range(5):
            block.add_(1)

    assert peak_growth(call, CPU) == pytest.approx(300e6, rel=0.02)


@pytest.mark.parametrize("peer", PEERS.values(), ids=lambda peer: peer.name)
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_every_peer_computes_the_loss_of_the_float64_run(folder, peer, head):
    sent = Sent()
    measure._measure_job(Job("tiny", peer.name, head, [64], folder, "cpu"), sent)
    (row,) = sent
    if row.status == "missing":
        pytest.skip(row.reason)
    assert row.status == "ok", row.reason
    assert row.loss_error < 1e-5
    assert row.hidden_grad_error < 1e-5
    assert (row.weight_grad_error is None) == (head == "frozen")
    assert row.weight_grad_error is None or row.weight_grad_error < 1e-5
    assert row.peak_extra_bytes >= 0
    assert 0 < row.forward_seconds < row.seconds


def test_reference_is_autograd_of_the_whole_batch(folder):
    tensors = load_batch(folder / "batch.pt", 64, CPU)
    hidden, weight, labels, shaping = (t.double() if t.is_floating_point() else t for t in tensors)
    hidden.requires_grad_(), weight.requires_grad_()
    logps = torch.log_softmax(hidden @ weight.T, -1).gather(-1, labels.unsqueeze(-1))
    saved = torch.load(reference_file(folder, 64))
    for alpha in (0.0, 1.0):
        loss = tvkd(logps.sum((1, 2)), shaping, alpha)
        grads = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        assert saved[alpha]["loss"] == pytest.approx(loss.item(), rel=1e-12)
        torch.testing.assert_close(saved[alpha]["hidden_grad"], grads[0].float())
        torch.testing.assert_close(saved[alpha]["weight_grad"], grads[1].float())


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ImportError("no name 'x' in 'y' (/some/where/y.py)"), "missing", "no name 'x' in 'y'"),
        (RuntimeError("too large\ntrace"), "failed", "RuntimeError: too large"),
    ],
)
def test_a_peer_that_cannot_run_is_a_row(folder, monkeypatch, error, status, reason):
    def loss(*tensors):
        raise error

    monkeypatch.setitem(PEERS, "broken", Peer("broken", loss))
    sent = Sent()
    measure._measure_job(Job("tiny", "broken", "frozen", [64], folder, "cpu"), sent)
    assert (sent[0].status, sent[0].reason) == (status, reason)


def test_run_uses_another_process_and_reports_its_death(folder):
    (row,) = run(Job("tiny", "full logits", "trained", [64], folder, "cpu"))
    assert row.status == "ok"
    (row,) = run(Job("tiny", "no such peer", "trained", [64], folder, "cpu"))
    assert row.status == "failed"
    assert PEERS["full logits"].loss is full_logits
