"""Streams of frames: order, bounds, back-pressure, buffers, errors; in each runtime that has a queue of its own."""

from __future__ import annotations

import numpy as np
import pytest

import deploykit
from deploykit.errors import SpecError
from tests.accuracy.small_classifier import SIDE, export, small_classifier

RUNTIMES = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    module, shape = small_classifier()
    folder = tmp_path_factory.mktemp("bundles")
    for runtime in RUNTIMES:
        deploykit.export_backbone(module, folder / runtime, runtime=runtime, batch_size=(1, 2, 4), **shape)
    return folder


@pytest.fixture(scope="module", params=[(runtime, hint) for runtime in RUNTIMES for hint in ("latency", "throughput")])
def engine(request, bundles):
    runtime, hint = request.param
    with deploykit.load_bundle(bundles / runtime, hint=hint, threads=2) as model:
        yield model


@pytest.fixture(scope="module")
def frames():
    generator = np.random.default_rng(0)
    return [generator.normal(size=(1 + index % 3, 3, SIDE, SIDE)).astype(np.float32) for index in range(12)]


@pytest.mark.parametrize("in_flight", [None, 1, 3, 50])
def test_answers_are_those_of_calls_in_their_order(engine, frames, in_flight):
    found = list(engine.stream(frames, in_flight=in_flight))
    assert len(found) == len(frames)
    for own, frame in zip(found, frames, strict=True):
        np.testing.assert_allclose(own, engine(frame), rtol=1e-5, atol=1e-5)


def test_no_frame_is_taken_before_there_is_room(engine, frames):
    taken = []

    def camera():
        while True:
            taken.append(len(taken))
            yield frames[len(taken) % len(frames)]

    stream = engine.stream(camera(), in_flight=3)
    for answered in range(1, 20):
        next(stream)
        assert len(taken) - answered < 3
    stream.close()
    assert len(taken) < 23


def test_one_frame_is_computed_at_a_time_for_latency_and_the_next_is_read_meanwhile(bundles, frames, monkeypatch):
    with deploykit.load_bundle(bundles / "onnxruntime", threads=2) as model:
        computing, together, run = [], [], model._run

        def counted(images):
            computing.append(images)
            together.append(len(computing))
            outputs = run(images)
            computing.pop()
            return outputs

        monkeypatch.setattr(model, "_run", counted)
        assert len(list(model.stream(frames * 20, in_flight=6))) == 20 * len(frames)
        assert set(together) == {1}
        assert model.in_flight == 2


def test_a_frames_buffer_may_be_used_again(engine, frames):
    buffer = np.empty_like(frames[0])

    def camera():
        for frame in frames[::3]:
            buffer[:] = frame
            yield buffer

    for own, frame in zip(engine.stream(camera(), in_flight=3), frames[::3], strict=True):
        np.testing.assert_allclose(own, engine(frame), rtol=1e-5, atol=1e-5)


def test_answers_are_the_callers_own(engine, frames):
    first, *rest = engine.stream([frames[0]] * 6, in_flight=2)
    kept = rest[-1].copy()
    first[:] = 7
    np.testing.assert_array_equal(rest[-1], kept)


def test_a_bad_frame_ends_the_stream_where_it_stands(engine, frames):
    stream = engine.stream([frames[0], frames[0].astype(np.float64)], in_flight=1)
    next(stream)
    with pytest.raises(SpecError, match="float64"):
        next(stream)

    def failing():
        yield frames[0]
        raise OSError("the camera is gone")

    with pytest.raises(OSError, match="camera"):
        list(engine.stream(failing(), in_flight=4))
    assert engine(frames[0]).shape[0] == len(frames[0])


def test_the_answers_before_a_bad_frame_come_first(engine, frames):
    def read(last):
        yield from frames[:3]
        if last is None:
            raise OSError("the camera is gone")
        yield last
        raise AssertionError("no frame is taken after a bad one")

    for last, error in ((frames[0].astype(np.float64), SpecError), (None, OSError)):
        found = []
        with pytest.raises(error):
            found.extend(iter_into(found, engine.stream(read(last), in_flight=4)))
        assert len(found) == 3
        for own, frame in zip(found, frames, strict=False):
            np.testing.assert_allclose(own, engine(frame), rtol=1e-5, atol=1e-5)


def iter_into(found, stream):
    """Append each answer as it comes, so that those before an error are kept."""
    for answer in stream:
        found.append(answer)
    return ()


def test_single_images_go_in_batches(engine, frames):
    images = np.concatenate(frames)[:9]
    found = list(engine.map(iter(images)))
    assert len(found) == 9
    np.testing.assert_allclose(np.stack(found), np.concatenate([engine(image[None]) for image in images]), atol=1e-5)
    assert list(engine.map([])) == []


@pytest.mark.parametrize("in_flight", [0, -1, 1.5, True, "4", 10**9])
def test_no_number_of_runs_is_refused(engine, frames, in_flight):
    with pytest.raises(SpecError, match="in_flight is"):
        next(engine.stream(frames, in_flight=in_flight))


async def camera():
    yield np.zeros((1, 3, 64, 64), np.float32)


@pytest.mark.parametrize("call", ["stream", "map"])
@pytest.mark.parametrize(
    ("frames", "remedy"), [(None, "a generator"), (3, "a generator"), (camera(), r"asyncio\.to_thread")]
)
def test_what_gives_no_frames_is_refused(engine, call, frames, remedy):
    with pytest.raises(SpecError, match=f"the frames are .*{remedy}"):
        next(getattr(engine, call)(frames))


def test_a_hint_and_a_closed_engine_are_refused(bundles, frames):
    with pytest.raises(SpecError, match="hint is 'speed'"):
        deploykit.load_bundle(bundles / "onnxruntime", hint="speed")
    model = deploykit.load_bundle(bundles / "onnxruntime")
    model.close()
    with pytest.raises(SpecError, match="closed"):
        next(model.stream(frames))


def test_features_and_torch_tensors_stream_too(tmp_path):
    import torch

    bundle = export(tmp_path / "features", classes=0)
    with deploykit.load_bundle(bundle) as model:
        images = torch.zeros(1, 3, SIDE, SIDE)
        (found,) = model.stream([images])
        assert isinstance(found["deep"], torch.Tensor)
        (single,) = model.map(images.numpy())
        assert single["deep"].ndim == 3


def test_a_reader_may_fill_its_buffer_again(engine, frames):
    images = np.concatenate(frames)[:9]

    def read():
        buffer = np.empty_like(images[0])
        for image in images:
            buffer[:] = image
            yield buffer

    np.testing.assert_array_equal(np.stack(list(engine.map(read()))), np.stack(list(engine.map(iter(images)))))


def test_a_hint_that_a_runtime_has_no_use_for_is_refused():
    with pytest.raises(SpecError, match="the torch runtime has no such choice"):
        deploykit.create_backbone("resnet18", image_size=32, hint="throughput")
