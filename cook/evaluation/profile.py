"""Measures how long a model's blocks take at different sizes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from cook.base.errors import UserError
from cook.config.kinds import Kind
from cook.evaluation.settings import ProfileSettings, device_of
from cook.evaluation.speed import median_seconds
from cook.export.pruned_folder import reshaped_source
from cook.families.source import load_model, placed
from cook.pruning.block_times import BlockTimes, Curve
from cook.pruning.family import ModelSource, vocabulary_size
from cook.pruning.units import WIDE, PruningSpace
from cook.report.tables import markdown_table


def measure_block_times(
    source: ModelSource,
    settings: ProfileSettings,
    *,
    wide: Sequence[Kind] = WIDE,
    on_point: Callable[[str], None] = lambda _text: None,
) -> BlockTimes:
    """Measures a model whose blocks have been cut to several sizes, each in turns with the whole model.

    All blocks of a kind have one size in each measurement, so the time of one block is a share of the difference. The
    ratio to the whole model is what counts, so a machine that slows down in between does not distort the table.

    Args:
        source: The model; it must be a causal language model, with blocks of one size.
        settings: What to measure.
        wide: Of head and hidden dimensions, those whose numbers are measured too, if the model can lose them.
        on_point: Called with a sentence after each measurement.

    Raises:
        UserError: the model has blocks of different sizes, or none of a kind, or is too small to be measured.
    """
    space = source.adapter.space(source.config)
    if space.of("experts"):
        raise UserError(f"{source.path}: the times of experts cannot be measured", remedy="set another budget")
    kinds: tuple[Kind, ...] = ("heads", "dimff")
    groups = {kind: space.of(kind) for kind in kinds}
    for kind, found in groups.items():
        if len({group.size for group in found}) != 1:
            raise UserError(
                f"{source.path}: blocks of different sizes cannot be profiled", got=f"{kind} of several sizes"
            )
    run = _Passes(source, space, settings)
    removed: dict[Kind, float] = {
        kind: run.share({space.block(g).name: 0 for g in found}) for kind, found in groups.items()
    }
    for kind, share in removed.items():
        on_point(f"without blocks of {kind}: {share:.3f} of the time")
        if share >= 1:
            raise UserError(
                f"{source.path}: blocks of {kind} take no time that can be measured",
                remedy="measure longer rows or larger batches, while nothing else runs on the machine",
            )
    curves = {}
    for kind, found in groups.items():
        size, count = found[0].size, len(found)
        points = [(0.0, 0.0)]
        for units in _sizes(size, settings.points):
            share = run.share({group.name: units for group in found})
            on_point(f"{units} of {size} units of {kind} per block: {share:.3f} of the time")
            points.append((units / size, (share - removed[kind]) / count))
        points.append((1.0, (1.0 - removed[kind]) / count))
        curves[kind] = points
    widths: dict[str, list[tuple[float, float]]] = {}
    for group in (group for group in space.every if group.kind in wide and group.layer < 0):
        widths[group.kind] = []
        for units in _sizes(group.size, settings.points):
            share = run.share({group.name: units})
            on_point(f"{units} of {group.size} units of {group.kind}: {share:.3f} of the time")
            widths[group.kind].append((units / group.size, share))
        widths[group.kind].append((1.0, 1.0))
    whole = 1000 * statistics.median(run.whole)
    return BlockTimes(
        rest=max(0.0, whole * (removed["heads"] + removed["dimff"] - 1.0)),
        heads=_curve(curves["heads"], whole),
        dimff=_curve(curves["dimff"], whole),
        num_layers=space.num_layers,
        settings={"model": str(source.path), **asdict(settings), "device": device_of(settings)},
        wide={kind: _curve(points, whole) for kind, points in widths.items()},
    )


def time_share(small: ModelSource, whole: ModelSource, settings: ProfileSettings) -> float:
    """The time of a forward pass of `small`, as a share of that of `whole`; measured in turns."""
    return _Passes(whole, whole.adapter.space(whole.config), settings).share_of(small)


def _sizes(size: int, points: int) -> list[int]:
    """Numbers of units to measure besides all of them, evenly spaced, ascending."""
    return sorted({max(1, round(size * n / points)) for n in range(1, points)} - {size})


def _curve(points: Sequence[tuple[float, float]], whole: float) -> Curve:
    """The curve in milliseconds. Noise may not make a smaller block slower than a larger one."""
    shares, parts = zip(*points, strict=True)
    ms = torch.tensor(parts, dtype=torch.float64).clamp(min=0.0).cummax(0).values * whole
    return Curve(shares=shares, ms=tuple(ms.tolist()))


class _Passes:
    """Times of the whole model and of cut ones."""

    def __init__(self, source: ModelSource, space: PruningSpace, settings: ProfileSettings):
        self._source, self._space, self._settings = source, space, settings
        self._device = torch.device(device_of(settings))
        self._model = self._placed(source)
        self.whole: list[float] = []
        """Seconds of the whole model, one per measurement."""

    def _placed(self, source: ModelSource) -> torch.nn.Module:
        model = load_model(source)
        return placed(model, self._device, getattr(torch, self._settings.dtype)).eval()

    def share(self, kept: dict[str, int]) -> float:
        """The time of the model with some sizes, as a share of the whole model's."""
        sizes = {group.name: group.size for group in self._space.every}
        masks = {name: (torch.arange(sizes[name]) < units).float() for name, units in kept.items()}
        return self.share_of(reshaped_source(self._source, self._space, masks))

    def share_of(self, source: ModelSource) -> float:
        """The time of another model, as a share of the whole model's."""
        actions = {"whole": self._pass(self._model), "small": self._pass(self._placed(source))}
        seconds = median_seconds(actions, self._device, repeats=self._settings.repeats)
        self.whole.append(seconds["whole"])
        return seconds["small"] / seconds["whole"]

    def _pass(self, model: torch.nn.Module) -> Callable[[], object]:
        settings = self._settings
        shape = (settings.batch_size, settings.length)
        ids = torch.arange(shape[0] * shape[1], device=self._device).reshape(shape) % vocabulary_size(
            self._source.config
        )
        if settings.phase == "prefill":
            return torch.no_grad()(lambda: model(input_ids=ids, use_cache=False))
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True).past_key_values
        # The cache grows by a token per pass, in both models alike.
        return torch.no_grad()(lambda: model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True))


def table(times: BlockTimes) -> str:
    """The measured times as a Markdown table."""
    rows = [
        [name, f"{share:.2f}", f"{ms:.3f}"]
        for name, curve in (("attention", times.heads), ("FFN", times.dimff))
        for share, ms in zip(curve.shares, curve.ms, strict=True)
    ]
    rows += [
        [f"whole model, {kind}", f"{share:.2f}", f"{ms:.3f}"]
        for kind, curve in times.wide.items()
        for share, ms in zip(curve.shares, curve.ms, strict=True)
    ]
    note = f"whole model {times.whole:.2f} ms, of which {times.rest:.2f} ms are outside the blocks"
    return markdown_table(["block", "share of units", "ms"], rows) + f"\n\n{note}"
