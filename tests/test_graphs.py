from __future__ import annotations

import gc
import threading
from contextlib import contextmanager, nullcontext
from functools import partial
from time import sleep
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rf_core.fast.graphs import CudaCapture, GraphedModel, TraceCapture, _Inputs
from rf_core.fast.quantise import quantise_linears
from rf_core.kernels import availability, onednn
from rf_core.memory.offload import stream_layers
from rf_core.model import WanModel
from rf_core.stream import Stream


class Recorder:
    """Captures as CUDA does: runs on what it was given at first, whatever comes later."""

    patience = 0

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, run):
        self.captured += 1
        result = run()[0].clone()

        def replay():
            self.replayed += 1
            return result.copy_(run()[0])

        return replay


class TraceRecorder(Recorder):
    """Counts what is traced and replayed."""

    def __call__(self, run):
        self.captured += 1
        trace = TraceCapture()(run)

        def replay():
            self.replayed += 1
            return trace()

        return replay


@pytest.fixture(params=[Recorder, TraceRecorder], ids=["as a card does", "traced"])
def graphed(request) -> tuple[GraphedModel, Recorder]:
    recorder = request.param()
    return GraphedModel(tiny.model(), recorder), recorder


def stream_of(model, prompt: int = 0, **options) -> Stream:
    return tiny.stream(model=model, prompt_embeds=tiny.prompt(prompt), **options)


def latents_of(stream: Stream, chunks: int = 6, switch_at: int | None = None) -> torch.Tensor:
    made = []
    for index in range(chunks):
        if index == switch_at:
            stream.switch(tiny.prompt(7), "recache")
        made.append(stream.step().latents)
    return torch.cat(made, dim=2)


@pytest.mark.slow
@pytest.mark.parametrize("switch_at", [None, 2, 4])
@pytest.mark.parametrize("keep_rotated", [True, False])
def test_replayed_passes_make_the_video_that_plain_passes_make(graphed, switch_at, keep_rotated):
    model, recorder = graphed
    options = {"keep_rotated": keep_rotated, "cache": tiny.window(9, 3)}
    made = latents_of(stream_of(model, **options), switch_at=switch_at)
    assert torch.equal(made, latents_of(stream_of(tiny.model(), **options), switch_at=switch_at))
    assert recorder.replayed > recorder.captured


@pytest.mark.slow
def test_each_form_of_a_pass_is_captured_once_and_serves_the_next_stream(graphed):
    model, recorder = graphed
    first = latents_of(stream_of(model, 0))
    gc.collect()
    # Denoising and clean passes, each while the window holds 3, 6 and 9 frames.
    assert recorder.captured == 6
    second = latents_of(stream_of(model, 1, seed=5))
    assert recorder.captured == 6
    assert torch.equal(second, latents_of(stream_of(tiny.model(), 1, seed=5)))
    assert not torch.equal(first, second)


def test_prompts_of_any_length_are_served_by_the_same_passes(graphed):
    model, recorder = graphed
    prompts = [tiny.prompt(number, tokens) for number, tokens in enumerate((3, 10, 3, 0, 9))]

    def made(network) -> torch.Tensor:
        stream = tiny.stream(model=network, prompt_embeds=prompts[0], cache=tiny.window(6, 3))
        parts = []
        for prompt in prompts:
            stream.switch(prompt, "soft")
            parts += [stream.step().latents for _ in range(3)]
        return torch.cat(parts, dim=2)

    assert torch.equal(made(model), made(tiny.model()))
    assert recorder.captured == 4  # denoising and clean passes, while the window holds 3 and 6


@pytest.mark.slow
def test_streams_that_live_at_once_have_caches_of_their_own(graphed):
    model, _ = graphed
    streams = [stream_of(model, 0), stream_of(model, 1)]
    made = [[stream.step().latents for stream in streams] for _ in range(5)]
    places = [inputs.x.data_ptr() for inputs in model._inputs.values()]
    assert len(set(places)) == len(streams)  # what one is given, the other's pass cannot read
    for number, chunks in enumerate(zip(*made, strict=True)):
        alone = latents_of(stream_of(tiny.model(), number), 5)
        assert torch.equal(torch.cat(chunks, dim=2), alone)


@pytest.mark.slow
def test_a_fork_runs_uncaptured_and_a_restored_stream_captured(graphed):
    model, recorder = graphed
    stream = stream_of(model)
    latents_of(stream, 5)
    fork, captured = stream.fork(), recorder.captured
    snapshot, ahead = stream.snapshot(), stream.step().latents
    assert torch.equal(fork.step().latents, ahead)
    assert recorder.captured == captured
    del stream, fork
    gc.collect()
    again, replayed = Stream.from_snapshot(model, snapshot), recorder.replayed
    assert torch.equal(again.step().latents, ahead)
    assert (recorder.captured, recorder.replayed) == (captured, replayed + 2)


class Copies(TorchDispatchMode):
    """Counts the copies that a card is given: many at once where dtypes and strides are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._foreach_copy_.default:
            pairs = list(zip(*args[:2], strict=True))
            alike = len({(t.dtype, s.dtype) for t, s in pairs}) == 1
            alike &= all(t.stride() == s.stride() for t, s in pairs)
            self.count += 1 if alike else len(pairs)
        else:
            self.count += func is torch.ops.aten.copy_.default
        return result


def test_a_pass_takes_over_its_inputs_in_few_copies():
    network, x = tiny.model(), torch.zeros(1, 4, 3, 4, 6)
    times = [network.time_context(torch.full((1, 3), at), torch.float32) for at in (500.0, 0.0)]
    prompts = [network.prompt_context(tiny.prompt(seed)) for seed in (0, 1)]
    inputs, counted = _Inputs.like(x, times[0], prompts[0]), []
    for time, prompt in ((0, 0), (0, 0), (1, 0), (0, 1)):
        with Copies() as copies:
            inputs.set(x + 1, times[time], prompts[prompt])
        counted.append(copies.count)
        assert torch.equal(inputs.x, x + 1)
        there = (inputs.time.blocks, inputs.time.head, inputs.prompt)
        wanted = (times[time].blocks, times[time].head, prompts[prompt])
        assert all(map(torch.equal, tree_leaves(there), tree_leaves(wanted)))
    # The latents; what the timestep does; the prompt's keys, and its values.
    assert counted == [4, 1, 2, 4]


@pytest.mark.slow
def test_another_size_lets_go_of_what_was_captured(graphed):
    model, recorder = graphed
    latents_of(stream_of(model), 3)
    before = recorder.captured
    small = stream_of(model, height=16, width=16)
    assert torch.equal(
        latents_of(small, 3), latents_of(stream_of(tiny.model(), height=16, width=16), 3)
    )
    assert len(model._passes) == recorder.captured - before


def test_on_a_cpu_only_what_comes_often_is_captured():
    model = GraphedModel(tiny.model())
    stream = stream_of(model)
    latents_of(stream, 5)  # of the forms with a growing window none comes more than twice
    assert not model._passes
    latents_of(stream, 9)
    assert len(model._passes) == 2  # denoising and clean, with a full window


def test_a_joint_recache_is_run_as_it_is_however_often_it_comes(graphed):
    model, _ = graphed
    options = {"cache": tiny.window(6, 2, chunk=2, recache="joint")}
    expected = tiny.stream(**options)
    stream = tiny.stream(model=model, **options)
    for _ in range(5):
        for each in (stream, expected):
            each.switch(tiny.prompt(1), "recache")
        assert torch.equal(stream.generate(), expected.generate())
    assert {x.shape[2] for x in (each.x for each in model._inputs.values())} == {2}


class Failing(Recorder):
    """Records a few passes, then has no memory for more."""

    def __call__(self, run):
        if self.captured == 3:
            raise torch.OutOfMemoryError("no memory for another graph")
        return super().__call__(run)


def test_where_recording_fails_the_stream_goes_on_without_or_says_so(caplog):
    expected = latents_of(stream_of(tiny.model()))
    recorder = Failing()
    made = latents_of(stream_of(GraphedModel(tiny.model(), recorder, must=False)))
    assert torch.equal(made, expected)
    assert recorder.captured == 3 and recorder.replayed
    assert [r.getMessage() for r in caplog.records] == [
        "passes run unrecorded, which costs speed alone: no memory for another graph"
    ]
    with pytest.raises(torch.OutOfMemoryError):
        latents_of(stream_of(GraphedModel(tiny.model(), Failing())))


def test_an_int8_cache_is_not_traced_and_streams_all_the_same():
    cache = tiny.window(9, 3, storage="int8")
    made = latents_of(stream_of(model := GraphedModel(tiny.model()), cache=cache))
    assert torch.equal(made, latents_of(stream_of(tiny.model(), cache=cache)))
    assert not model._passes


def test_networks_that_graphs_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="on one card or on the CPU, and the weights are on meta"):
        GraphedModel(WanModel(tiny.CONFIG, device="meta"))
    hooked = tiny.model()
    hooked.blocks[0].ffn.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"the hooks of blocks\.0\.ffn would not run"):
        GraphedModel(hooked)
    stream_layers(streamed := tiny.model(), "blocks", "cpu")
    with pytest.raises(ValueError, match="leave out --offload stream"):
        GraphedModel(streamed)


def test_a_card_records_what_recurs_and_in_the_thread_that_has_run_it():
    recorder = Recorder()
    recorder.patience = CudaCapture.patience
    network = GraphedModel(tiny.model(), recorder)
    latents_of(stream_of(network), 3)  # while the window grows, every clean pass is the only one
    assert recorder.captured == 3  # denoising, three lengths
    latents_of(stream_of(network), 1)
    assert recorder.captured == 3
    elsewhere = threading.Thread(target=lambda: latents_of(stream_of(network), 1))
    replayed = recorder.replayed
    elsewhere.start()
    elsewhere.join()
    steps = len(tiny.stream().sampler.steps)
    assert recorder.replayed == replayed + steps - 1  # the first set its libraries up


class Card:
    """Stands for torch.cuda and notes what a capture asks of it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.notes: list[tuple] = []
        self.current, self.pools, self.fails = "main", iter("abc"), False
        patch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(wait_stream=self.waits))
        patch.setattr(torch.cuda, "current_stream", self.current_stream)
        patch.setattr(torch.cuda, "current_device", lambda: 1)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: next(self.pools))
        patch.setattr(torch.cuda, "CUDAGraph", type("Graph", (), {"replay": lambda graph: None}))
        patch.setattr(torch.cuda, "device", self.within)
        patch.setattr(torch.cuda, "stream", self.within)
        patch.setattr(torch.cuda, "graph", self.graph)
        for name in ("endAllocateToPool", "releasePool"):
            patch.setattr(torch._C, f"_cuda_{name}", partial(self.note, name), raising=False)

    def note(self, *what) -> None:
        self.notes.append(what)

    def current_stream(self):
        return SimpleNamespace(name=self.current, wait_stream=self.waits)

    def waits(self, stream) -> None:
        self.notes.append(("wait",))

    def within(self, what):
        return nullcontext()

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.notes.append((pool, stream, capture_error_mode))
        yield
        if self.fails:
            raise RuntimeError("the capture was invalidated")


def test_a_card_s_captures_share_a_stream_and_a_pool_until_all_are_gone(monkeypatch):
    card, result = Card(monkeypatch), torch.ones(2)
    capture = CudaCapture(torch.device("cuda:1"))
    replays = [capture(lambda: (result,)) for _ in range(2)]
    captures = [note for note in card.notes if len(note) == 3]
    assert card.notes == [("wait",), ("wait",), *captures]  # a first run sets libraries up, once
    assert captures[0] == captures[1]
    assert captures[0][0] == "a" and captures[0][2] == "thread_local"
    del replays
    gc.collect()
    capture(lambda: (result,))
    assert card.notes[-1] == ("b", *captures[0][1:])


def test_a_card_s_replays_follow_one_another_and_leave_results_of_their_own(monkeypatch):
    card, result = Card(monkeypatch), torch.ones(2)
    replays = [CudaCapture(torch.device("cuda:1"))(lambda: (result,))] * 2
    card.notes.clear()
    made = [replay() for replay in replays]
    assert not card.notes  # on one stream they do
    result.fill_(9)  # as by the next graph, in the memory they share
    assert torch.equal(torch.stack(made), torch.ones(2, 2))
    card.current = "another thread's"
    replays[0]()
    assert card.notes == [("wait",)]


def test_a_card_s_failed_capture_leaves_streams_and_allocator_as_they_were(monkeypatch):
    card = Card(monkeypatch)
    capture = CudaCapture(torch.device("cuda:1"))

    def out_of_memory():
        raise torch.OutOfMemoryError("in the first run")

    with pytest.raises(torch.OutOfMemoryError):
        capture(out_of_memory)
    assert card.notes == [("wait",), ("wait",)]  # what was queued is waited for all the same
    card.fails = True
    with pytest.raises(RuntimeError, match="invalidated"):
        capture(lambda: (torch.ones(2),))
    assert card.notes[-2:] == [("endAllocateToPool", 1, "b"), ("releasePool", 1, "b")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_on_a_card_sizes_follow_one_another():
    network = tiny.model().cuda()
    graphed = GraphedModel(network)
    for height in (32, 16, 32):
        made = latents_of(stream_of(graphed, height=height))
        plain = latents_of(stream_of(network, height=height))
        torch.testing.assert_close(made, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("switch_at", [None, 4])
def test_on_a_card_graphs_make_the_video_that_launches_make(switch_at):
    network = tiny.model().cuda()
    made = latents_of(stream_of(GraphedModel(network)), switch_at=switch_at)
    plain = latents_of(stream_of(network), switch_at=switch_at)
    torch.testing.assert_close(made, plain, atol=1e-5, rtol=1e-5)


def test_passes_in_bfloat16_are_recorded_to_the_bit_on_a_cpu():
    plain, recorder = tiny.model().bfloat16(), TraceRecorder()
    made = latents_of(stream_of(GraphedModel(tiny.model().bfloat16(), recorder)))
    assert recorder.replayed > recorder.captured
    assert torch.equal(made, latents_of(stream_of(plain)))


@pytest.mark.slow
def test_passes_with_products_by_onednn_are_recorded_too(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(availability, "onednn_multiplies", lambda: True)
    monkeypatch.setattr(availability, "_MIN_FOR_ONEDNN", 0)
    products = []
    product = onednn.linear
    spy = lambda *args, **options: products.append(1) or product(*args, **options)  # noqa: E731
    monkeypatch.setattr(onednn, "linear", spy)
    made = latents_of(stream_of(GraphedModel(tiny.model(), recorder := TraceRecorder())))
    assert products and recorder.replayed > recorder.captured
    assert torch.equal(made, latents_of(stream_of(tiny.model())))


def test_a_trace_holds_no_arithmetic_with_sizes():
    traced = TraceCapture()

    def run():
        x = torch.ones(2, 6)
        return (x.reshape(x.shape[0] * 3, x.shape[1] // 3) * x.shape[0],)

    calls = []
    trace = torch.jit.trace

    def spy(*args, **options):
        calls.append(trace(*args, **options))
        return calls[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.jit, "trace", spy)
        replay = traced(run)
    assert torch.equal(replay(), run()[0])
    assert "aten::size" not in str(calls[0].inlined_graph)


def assigned(model: WanModel) -> None:
    model.load_state_dict(tiny.model(seed=1).state_dict(), assign=True)


def given_new_data(model: WanModel) -> None:
    for parameter, other in zip(model.parameters(), tiny.model(seed=1).parameters(), strict=True):
        parameter.data = other.data


def given_another_layer(model: WanModel) -> None:
    model.blocks[1].ffn = tiny.model(seed=1).blocks[1].ffn


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def given_other_code(model: WanModel) -> None:
    old = model.blocks[1].cross_attn.o
    model.blocks[1].cross_attn.o = new = Doubled(old.in_features, old.out_features, device="meta")
    new.weight, new.bias = old.weight, old.bias


CHANGES = [
    *(assigned, given_new_data, given_another_layer, given_other_code),
    *(quantise_linears, WanModel.bfloat16),
]


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_weights_that_lie_elsewhere_are_recorded_anew(change):
    network, recorder = tiny.model(), TraceRecorder()
    graphed = GraphedModel(network, recorder)
    latents_of(stream_of(graphed))
    gc.collect()
    change(network)
    change(expected := tiny.model())
    captured, replayed = recorder.captured, recorder.replayed
    made = latents_of(stream_of(graphed))
    assert torch.equal(made, latents_of(stream_of(expected)))
    assert recorder.captured == 2 * captured and recorder.replayed == 2 * replayed
    gc.collect()
    assert torch.equal(latents_of(stream_of(graphed)), made)
    assert recorder.captured == 2 * captured


@pytest.mark.slow
def test_weights_changed_where_they_lie_are_followed_without_recording_anew():
    network, recorder = tiny.model(), TraceRecorder()
    graphed = GraphedModel(network, recorder)
    before, captured = latents_of(stream_of(graphed)), recorder.captured
    gc.collect()
    with torch.no_grad():  # as an adapter merged in place
        network.blocks[0].self_attn.q.weight.add_(0.1)
    expected = latents_of(stream_of(network))
    assert torch.equal(latents_of(stream_of(graphed)), expected)
    assert not torch.equal(before, expected) and recorder.captured == captured


@pytest.mark.slow
def test_weights_exchanged_within_a_stream_count_from_the_next_pass():
    network = tiny.model()
    streams = [stream_of(GraphedModel(network, TraceRecorder())), stream_of(plain := tiny.model())]
    for _ in range(4):
        a, b = (stream.step().latents for stream in streams)
        assert torch.equal(a, b)
    assigned(network)
    assigned(plain)
    for _ in range(2):
        a, b = (stream.step().latents for stream in streams)
        assert torch.equal(a, b)


def test_a_hook_that_comes_later_is_refused_as_one_that_was_there():
    network = tiny.model()
    stream = stream_of(GraphedModel(network, TraceRecorder()))
    stream.step()
    hook = network.blocks[0].ffn.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"the hooks of blocks\.0\.ffn would not run"):
        stream.step()
    hook.remove()
    stream.step()


class Slow(Recorder):
    """Gives other threads time to come between, where they may."""

    busy = False

    def __call__(self, run):
        replay = self.alone(partial(super().__call__, run))
        return partial(self.alone, replay)

    def alone(self, run):
        assert not self.busy
        self.busy = True
        sleep(0.005)
        result = run()
        sleep(0.005)
        self.busy = False
        return result


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Slow, TraceRecorder])
def test_streams_in_threads_of_their_own_make_what_each_makes_alone(kind):
    model, made = GraphedModel(tiny.model(), kind()), {}
    streams = [stream_of(model, number, seed=number) for number in range(3)]

    def make(number: int) -> None:
        made[number] = latents_of(streams[number], 8, switch_at=3)

    threads = [threading.Thread(target=make, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(3):
        alone = latents_of(stream_of(tiny.model(), number, seed=number), 8, switch_at=3)
        assert torch.equal(made[number], alone)
