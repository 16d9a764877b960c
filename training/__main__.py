"""The trainer's command line: recipes, and what is done with what they make.

Run by `torchrun`, a recipe takes every process it is given; by `python`, one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rf_core.attention import check_device
from rf_core.config import WAN_1_3B, WAN_14B
from rf_core.console import exit_process, forgiving_console
from rf_core.measure.verify import Backend, Comparison, verify_folder
from rf_core.ranges import MANY, check_folder_writable, check_numbers, check_writable

from .choices import check_reward
from .claims.command import add_claims_arguments, run_claims
from .data.pairs import PairsConfig
from .objective.verify import KINDS
from .rewards.videoalign import convert
from .run.config import to_json
from .run.distributed import Stopped, check_shares, exit_code, process_group, world_size
from .run.folder import (
    CONTROL,
    STUDENT,
    TEACHER,
    checkpoints,
    read_config,
    recipe_of,
    saved_weights,
)
from .run.machine import check_machine, num_processes
from .run.options import (
    add_config_arguments,
    add_run_arguments,
    begins_with_preset,
    config_from_args,
    format_numbers,
    print_rank_0,
    show_progress,
)
from .stages import (
    consistency,
    contexts,
    control,
    dry_run,
    evaluation,
    latents,
    regression,
    teacher,
    trajectories,
)
from .stages.control import ControlRunConfig
from .stages.costs import RECIPES, Given, costs, format_costs, matmul_speed
from .stages.export import export, export_control, export_supervised
from .stages.latents import LatentsConfig
from .stages.re_dmd import check_files, distil, origin_of, provenance, read_sizes
from .stages.recipes import PRESETS, DistilConfig, student_path, with_sink
from .stages.regression import InitConfig, init_config
from .stages.schedule import (
    notes_on_family,
    notes_on_schedule,
    notes_on_taken,
    schedule_of,
    with_schedule_of_student,
)
from .stages.teacher import TeacherConfig
from .stages.trainer import report_numbers

SIZES = {"1.3b": WAN_1_3B, "14b": WAN_14B}
NETWORKS = ("student", "teacher", "critic")
SAVED = {TeacherConfig.recipe: TEACHER, ControlRunConfig.recipe: CONTROL}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@forgiving_console()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it went well, 1 on an error of the user's, 128 and the number of a
    signal that stopped it."""
    args = _parser().parse_args(arguments)
    try:
        return args.command(args)
    except (ValueError, OSError, FloatingPointError, Stopped, KeyboardInterrupt) as error:
        return exit_code(error)


def run_verify(args: argparse.Namespace) -> int:
    """Compare the losses with recorded outputs of the published code."""
    check_device(args.device, DTYPES[args.dtype], "sdpa")
    backend = Backend(device=args.device, dtype=DTYPES[args.dtype])
    failures = 0
    for result in verify_folder(args.folder, backend, KINDS):
        failures += isinstance(result, Comparison) and not result.agrees
        print(result if isinstance(result, Comparison) else f"     {result}")
    print("all agree" if not failures else f"{failures} outputs disagree")
    return 1 if failures else 0


def run_redmd(args: argparse.Namespace) -> int:
    """Distil a student."""
    config, notes = _config(args)
    if args.dry_run:
        return dry_run.dry_redmd(args, config, dry_run.stand_ins(args, PRESETS))
    check_machine(config.placement, config.output.wandb)
    over = config.placement.sequence_over
    check_shares(config.run.redmd.batch, config.run.micro_batch, num_processes(), over)
    for reward in config.rewards:
        check_reward(reward)
    check_folder_writable(args.out)
    with process_group(args.device) as device:
        given = Given(sizes=vars(read_sizes(config)))
        speed = _speed(config, device, None)
        counted = format_costs(costs(config, given, world_size()), world_size(), *speed)
        print_rank_0("\n".join([to_json(config), counted, *notes]))
        reports = distil(config, args.out, device, resume=args.resume)
        steps = ((each.update + 1, format_numbers(report_numbers(each))) for each in reports)
        show_progress(config.run.updates, "update", steps)
        print_rank_0(
            f"{args.out}: the averaged weights are in {', '.join(saved_weights(args.out))}"
        )
    return 0


def run_estimate(args: argparse.Namespace) -> int:
    """Count what a stage will take."""
    check_numbers(args, processes=(1, MANY), tflops=(1e-6, MANY), clips=(1, MANY))
    if args.recipe == DistilConfig.recipe:
        config, _ = _config(args)
    elif args.recipe == InitConfig.recipe:
        config, _ = init_config(args)
    else:
        config = config_from_args(args, *RECIPES[args.recipe])
    sizes = {name: SIZES[getattr(args, name)] for name in NETWORKS if getattr(args, name)}
    latents = tuple(args.latents) if args.latents else None
    found = costs(config, Given(sizes=sizes, latents=latents, clips=args.clips), args.processes)
    speed = _speed(config, torch.device(args.device), args.tflops)
    print(format_costs(found, args.processes, *speed))
    return 0


def _speed(config: Any, device: torch.device, tflops: float | None) -> tuple[float, str]:
    """Operations a second of a card, and whose they are."""
    if tflops is not None:
        return tflops * 1e12, "given"
    dtype = config.dtype if isinstance(config, LatentsConfig) else config.placement.dtype
    return matmul_speed(device, DTYPES[dtype]), "this machine's matrix products"


def run_export(args: argparse.Namespace) -> int:
    """Write a checkpoint of a run as a student's file, or of a teacher's as a teacher's."""
    check_writable(args.out)
    recipe = recipe_of(args.run)
    if recipe == PairsConfig.recipe:
        raise ValueError(
            f"{args.run} holds trajectories; ode_init makes a student of them: export its run"
        )
    found = dict(checkpoints(args.run))
    if not found:
        raise ValueError(f"{args.run} holds no checkpoint")
    update = args.update if args.update is not None else max(found)
    if update not in found:
        raise ValueError(f"{args.run} holds no update {update}; it has {sorted(found)}")
    if recipe == DistilConfig.recipe:
        _export_distilled(args, update, found[update])
    else:
        _export_supervised(args, recipe, update, found[update])
    print(args.out)
    return 0


def _export_distilled(args: argparse.Namespace, update: int, checkpoint: Path) -> None:
    config = read_config(DistilConfig, args.run)
    files = check_files(config)
    export(
        config,
        files["student"],
        checkpoint,
        args.out,
        weights=args.weights,
        dtype=DTYPES[args.dtype],
        adapter=args.adapter,
        note=provenance(config, update, origin_of(files)),
    )


def _export_supervised(
    args: argparse.Namespace, recipe: str, update: int, checkpoint: Path
) -> None:
    saved = args.run / SAVED.get(recipe, STUDENT)
    if args.adapter:
        raise ValueError(f"{args.run} is a run of {recipe}, which trains no adapter")
    if not saved.exists():
        raise ValueError(
            f"{saved} is not there, which says what {checkpoint.name} is; --resume the run, which "
            "writes it with its next checkpoint"
        )
    exported = export_control if recipe == ControlRunConfig.recipe else export_supervised
    exported(
        saved,
        checkpoint,
        args.out,
        weights=args.weights,
        dtype=DTYPES[args.dtype],
        update=update,
    )


def run_videoalign(args: argparse.Namespace) -> int:
    """Write a VideoAlign release as safetensors with its constants."""
    convert(args.release, args.base, args.out)
    print(args.out)
    return 0


def _config(args: argparse.Namespace) -> tuple[DistilConfig, list[str]]:
    """The config, and what there is to say about its student's schedule."""
    config = config_from_args(args, DistilConfig, PRESETS)
    preset = schedule_of(config)
    if begins_with_preset(args):
        config = with_schedule_of_student(config, args.set)
    taken = schedule_of(config).differences(preset)
    config = with_sink(config, args.sink) if args.sink else config
    path, family = student_path(config), config.files.family
    if not path.exists():
        return config, []
    notes = notes_on_family(path, family) + notes_on_taken(taken, path, family)
    return config, notes + notes_on_schedule(schedule_of(config), path, family)


def _or_dry(
    run: Callable[[argparse.Namespace], int], dry: Callable[[argparse.Namespace], int]
) -> Callable[[argparse.Namespace], int]:
    return lambda args: (dry if args.dry_run else run)(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    verify = commands.add_parser("verify", help="compare the losses with recorded outputs")
    verify.set_defaults(command=run_verify)
    verify.add_argument("folder", type=Path, help="folder of golden safetensors files")
    verify.add_argument("--device", default="cpu")
    verify.add_argument("--dtype", choices=DTYPES, default="float32")
    redmd = commands.add_parser("re_dmd", help="distil a student")
    redmd.set_defaults(command=run_redmd)
    add_run_arguments(redmd)
    redmd.add_argument("--sink", choices=("ema", "static", "none"), help="the sink of the run")
    add_config_arguments(redmd, PRESETS)
    encoding = commands.add_parser("latents", help="encode a folder of videos, once")
    latents.add_latents_arguments(encoding)
    encoding.set_defaults(command=latents.run_latents)
    teach = commands.add_parser(
        "teacher", help="train a teacher, or fine-tune it to continue clips"
    )
    teacher.add_teacher_arguments(teach)
    teach.set_defaults(command=_or_dry(teacher.run_teacher, dry_run.dry_teacher))
    pairs = commands.add_parser("ode_pairs", help="sample the teacher's ODE trajectories")
    trajectories.add_pairs_arguments(pairs)
    pairs.set_defaults(command=trajectories.run_pairs)
    init = commands.add_parser("ode_init", help="train a causal student on those trajectories")
    regression.add_init_arguments(init)
    init.set_defaults(command=_or_dry(regression.run_init, dry_run.dry_init))
    counting = commands.add_parser("estimate", help="memory, card hours and disk of a stage")
    counting.set_defaults(command=run_estimate)
    counting.add_argument("recipe", nargs="?", choices=RECIPES, default="re_dmd")
    counting.add_argument("--processes", type=int, default=1, help="how many share the run")
    counting.add_argument(
        "--tflops", type=float, help="a card's speed in TFLOP/s (default: measured here)"
    )
    for name in NETWORKS:
        counting.add_argument(f"--{name}", choices=SIZES, help="size, in place of its file's")
    shape = ("CHANNELS", "FRAMES", "ROWS", "COLUMNS")
    counting.add_argument(
        "--latents", type=int, nargs=4, metavar=shape, help="a clip, in place of its folder's"
    )
    counting.add_argument("--clips", type=int, help="latents: how many the videos are cut into")
    counting.set_defaults(sink=None)
    add_config_arguments(counting, PRESETS)
    cheaper = commands.add_parser("consistency", help="the same without stored trajectories")
    consistency.add_consistency_arguments(cheaper)
    cheaper.set_defaults(command=_or_dry(consistency.run_consistency, dry_run.dry_consistency))
    contextual = commands.add_parser("contexts", help="encode control videos, once")
    contexts.add_contexts_arguments(contextual)
    contextual.set_defaults(command=contexts.run_contexts)
    controlling = commands.add_parser("control", help="train a VACE beside a frozen network")
    control.add_control_arguments(controlling)
    controlling.set_defaults(command=_or_dry(control.run_control, dry_run.dry_control))
    export = commands.add_parser("export", help="write a run's checkpoint as a student")
    export.set_defaults(command=run_export)
    export.add_argument("run", type=Path, help="folder of a run: re_dmd, ode_init or teacher")
    export.add_argument("out", type=Path, help="the .safetensors to write")
    export.add_argument("--update", type=int, help="which checkpoint (default: the newest)")
    export.add_argument("--weights", choices=("average", "student"), default="average")
    export.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    export.add_argument("--adapter", action="store_true", help="the LoRA alone, not merged")
    measure = commands.add_parser("evaluate", help="measure checkpoints, or compare them blind")
    evaluation.add_arguments(measure)
    measure.set_defaults(command=evaluation.run)
    videoalign = commands.add_parser("videoalign", help="convert a VideoAlign release, once")
    videoalign.set_defaults(command=run_videoalign)
    videoalign.add_argument(
        "release", type=Path, help="folder with model_config.json and checkpoint-*"
    )
    videoalign.add_argument("base", help="Qwen2-VL-2B-Instruct: a folder or a hub id")
    videoalign.add_argument("out", type=Path, help="folder to write")
    claims = commands.add_parser("claims", help="the study of rewards and sinks, in miniature")
    add_claims_arguments(claims)
    claims.set_defaults(command=run_claims)
    return parser


if __name__ == "__main__":
    exit_process(main())
