"""``launch/bench.py space``: large crops divided over devices by rows, by widths or in space, on paper.

python launch/bench.py space [--crop=192] [--devices=2,4] [--config=…] [--config.a.b=value …]

Compiles forward and backward of the segmentation network for one crop on described devices (of a CPU), widths divided
by ``mesh.model`` or the first axis of the crop by ``mesh.space``, the borders between neighbours left to XLA; beside it
a crop on every device. Reads memory and collectives from the compiled programs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambamim_jax.bench.collectives import KINDS, Links, Program, by_kind
from mambamim_jax.bench.tables import print_table
from mambamim_jax.checks import ConfigError, LineParser, whole
from mambamim_jax.config import parse_command_line
from mambamim_jax.settings import PHANTOMS, MeshConfig
from mambamim_jax.settings_finetune import FinetuneConfig

PRESET = f"{Path(__file__).parents[2] / 'configs' / 'finetune.py'}:recipe"
CLASSES = 14
AXIS = {"rows": "data", "widths": "model", "space": "space"}


def compiled(config: FinetuneConfig, crop: int, devices: int, split: str) -> Any:
    """The gradient of the segmentation loss, compiled; nothing is allocated on the devices."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from mambamim_jax.model.rngs import Rngs
    from mambamim_jax.train.build import build_segmenter, to_dicts
    from mambamim_jax.train.finetune import graph_of
    from mambamim_jax.train.losses import segmentation_loss, targets_of
    from mambamim_jax.train.sharding import make_placement
    from mambamim_jax.train.step import RUN_SELDOM

    build = lambda rngs: build_segmenter(config.model, CLASSES, rngs)  # noqa: E731
    graph, batch = graph_of(build), devices if split == "rows" else 1
    mesh = MeshConfig(**{"data": 1, AXIS[split]: devices})
    placement = make_placement(mesh, batch, jax.devices()[:devices])
    params, _ = jax.eval_shape(lambda: to_dicts(build(Rngs(0))))
    divided = placement.shardings(params)
    place = placement.of_batch(5)

    def loss(params: Any, image: Any, label: Any) -> Any:
        logits = nnx.merge(graph, params)(image)
        return segmentation_loss(jax.lax.with_sharding_constraint(logits, place), targets_of(label, CLASSES))

    like = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), params, divided
    )
    image = jax.ShapeDtypeStruct((batch, *[crop] * 3, 1), jnp.float32, sharding=place)
    label = jax.ShapeDtypeStruct((batch, *[crop] * 3), jnp.uint8, sharding=placement.of_batch(4))
    gradient: Any = jax.jit(
        placement.traced(jax.value_and_grad(loss)), out_shardings=(placement.everywhere, divided)
    )
    return gradient.lower(like, image, label).compile(compiler_options=RUN_SELDOM)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 0, or 2 where the arguments cannot work."""
    parser = LineParser(prog="bench.py space", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--crop", type=whole(1), default=192, help="side in voxels")
    parser.add_argument("--devices", type=lambda text: [*map(int, text.split(","))], default=[2, 4])
    options, overrides = parser.parse_known_args(argv)
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(options.devices))
    preset = [] if any(a.startswith("--config=") for a in overrides) else [f"--config={PRESET}"]
    given = [*preset, "--workdir=.", f"--config.data.source={PHANTOMS}", *overrides]
    try:
        config, _ = parse_command_line(given, FinetuneConfig, __doc__ or "")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    rows, mebi, links = [], 2.0**20, Links()
    for count in options.devices:
        for split in AXIS:
            started = time.perf_counter()
            found = compiled(config, options.crop, count, split)
            memory, program = found.memory_analysis(), Program(found.as_text())
            sent = by_kind(program.collectives)
            busy = 1e3 * sum(map(links.seconds, program.collectives))
            busy += 1e3 * program.in_sequence * links.wait(count)
            row = [str(count), split, f"{memory.temp_size_in_bytes / mebi:.0f}"]
            row += [f"{found.cost_analysis()['flops'] / 1e12:.3g}"]
            row += [f"{sent.get(kind, 0) / mebi:.0f}" for kind in KINDS] + [str(program.in_sequence)]
            rows.append([*row, f"{busy:.1f}"])
            print(f"{split}, {count} devices: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    title = f"A crop of {options.crop}³ divided, forward and backward, {config.model.encoder}, {config.model.dtype}"
    header = ["devices", "divided by", "temporary MiB", "TFLOP a device", *(f"{kind} MiB" for kind in KINDS)]
    print_table(title, [*header, "in sequence", "ms on NVLink"], rows)
    return 0
