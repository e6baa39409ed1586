"""What the commands do with their flags; the work is done by the modules, imported when needed."""

import argparse
import os
import sys
from typing import Any

from kdgqa_jax import extras, flags, paths, workdir
from kdgqa_jax.errors import UserError, printable


def run_demo(arguments: argparse.Namespace) -> None:
    """The protocol of a study, on the demo's data."""
    from kdgqa_jax import config

    settings = config.load_config(f"demo:dataset={arguments.dataset}")
    for stage in (settings.pretrain, settings.uptrain, settings.finetune):
        stage.data.data_dir = arguments.data_dir
    settings.seeds, settings.seed = arguments.seeds, arguments.seed
    if arguments.variants:
        settings.variants = tuple(arguments.variants.split(","))
    settings = config.override(settings, arguments.overrides)
    _run_study(settings, arguments.workdir, arguments.jobs)


def run_study(arguments: argparse.Namespace) -> None:
    """The protocol of a config, or what it would do."""
    from kdgqa_jax import config, dry_run

    settings = config.override(config.load_config(arguments.config), arguments.overrides)
    if arguments.dry_run:
        dry_run.show(settings, arguments.workdir)
        return
    if not arguments.workdir:
        raise UserError("a study needs --workdir DIR, where its results go; --dry-run needs none")
    _run_study(settings, arguments.workdir, arguments.jobs)


def _run_study(settings: Any, workdir: str, jobs: int) -> None:
    from kdgqa_jax import study

    for package in ("scipy", "matplotlib", "jinja2"):  # a lack is found before hours of work
        extras.needs(package, "the report of a study")
    study.run_study(settings, workdir, jobs)


def run_report(arguments: argparse.Namespace) -> None:
    """Tables, plots and a page of a study or a run."""
    from kdgqa_jax import report
    from kdgqa_jax.console import say

    baselines = arguments.baselines.split(",") if arguments.baselines else []
    folder = report.build(arguments.workdir, baselines)
    say(f"open {folder / 'report.html'} in a browser")


def run_train(arguments: argparse.Namespace) -> None:
    """One training run, alone or as one of several processes."""
    from kdgqa_jax import config, train
    from kdgqa_jax.console import say

    _join(arguments)
    settings = config.override(config.load_config(arguments.config), arguments.overrides)
    result = train.train_and_evaluate(settings, arguments.workdir)
    if arguments.multihost:
        from kdgqa_jax import processes

        processes.part()
    say(
        f"test top-1 {result['top1']:.2f} % (best {result['best_top1']:.2f} %), top-5"
        f" {result['top5']:.2f} %, loss {result['loss']:.4f}; model in {arguments.workdir}/model"
    )


def _join(arguments: argparse.Namespace) -> None:
    """Become one of several processes, if that is asked for."""
    from kdgqa_jax import console, processes

    job = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    if arguments.multihost:
        if processes.join_processes(*job, arguments.join_timeout) > 0:
            console.be_silent()  # the first process speaks for all
    elif any(x is not None for x in job):
        raise UserError("--coordinator, --num-processes and --process-id need --multihost")


def run_prepare(arguments: argparse.Namespace) -> None:
    """Download and prepare a data set, and count it."""
    from kdgqa_jax.console import say
    from kdgqa_jax.data import sources

    dataset = sources.prepare(arguments.dataset, arguments.data_dir)
    say(
        f"{arguments.dataset}: {len(dataset.train):,} images to train on, {len(dataset.test):,} to"
        f" test on, {len(dataset.class_names)} classes"
    )


def run_bench_steps(what: str, arguments: argparse.Namespace) -> None:
    """Measure steps: "train" or "eval"."""
    from kdgqa_jax import config
    from kdgqa_jax.bench import steps

    _check_json("--json", arguments.json)
    settings = steps.bench_config(
        arguments.model, arguments.num_kv_heads, arguments.batch_size, arguments.dtype
    )
    settings = config.override(settings, arguments.overrides)
    results = steps.bench_steps(
        what,
        settings,
        arguments.variants.split(","),
        arguments.rounds,
        peer=arguments.peer == "torch",
        profile=arguments.profile or "",
    )
    _write_figures(arguments, results)


def run_compile(arguments: argparse.Namespace) -> None:
    """What a step costs on a TPU slice, by its compiler."""
    from kdgqa_jax import config, slices

    _check_json("--json", arguments.json)
    settings = config.load_config(arguments.config)
    axes = arguments.mesh.split(",") if arguments.mesh else []
    overrides = [*(f"--config.mesh.{axis}" for axis in axes), *arguments.overrides]
    for change in ("", *arguments.compare):  # all of them, before the first one takes minutes
        config.override(settings, [*overrides, *slices.overrides_of(change)])
    rows = slices.compile_for_slice(
        arguments.config,
        overrides,
        arguments.topology,
        step=arguments.step,
        per_chip_batch=arguments.per_chip_batch,
        compare=arguments.compare,
        python=arguments.python or sys.executable,
    )
    _write_figures(arguments, rows)


def run_doctor(arguments: argparse.Namespace) -> None:
    """What the machine has, and what would hold a run back."""
    import jax

    from kdgqa_jax import doctor, processes

    _check_json("--json", arguments.json)
    _join(arguments)
    found = doctor.doctor(arguments.config, arguments.overrides, arguments.workdir)
    if jax.process_index() == 0:
        _write_figures(arguments, [found])
    if arguments.multihost:
        processes.part()


def run_bench_data(arguments: argparse.Namespace) -> None:
    """Measure the stages of the input pipeline."""
    from kdgqa_jax import config
    from kdgqa_jax.bench import data

    _check_json("--json", arguments.json)
    settings = data.bench_config(
        arguments.dataset, arguments.data_dir, arguments.batch_size, arguments.workers
    )
    settings = config.override(settings, arguments.overrides)
    _write_figures(arguments, data.bench_data(settings, arguments.image_size, arguments.images))


def run_bench_convert(arguments: argparse.Namespace) -> None:
    """Measure a conversion."""
    from kdgqa_jax.bench import conversion

    _check_json("--json", arguments.json)
    found = conversion.bench_convert(
        arguments.model, arguments.pooling, arguments.calibration_images
    )
    _write_figures(arguments, [found])


def _write_figures(arguments: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Write what a benchmark found to --json, with what it was measured on."""
    import jax

    from kdgqa_jax import version

    if arguments.json:
        device = jax.devices()[0]
        flags = {n: v for n, v in vars(arguments).items() if n not in ("json", "debug")}
        measured_on = {
            "device": f"{jax.device_count()} x {device.device_kind}",
            "platform": device.platform,
            "processors": os.cpu_count(),
            "versions": version.versions(),
        }
        figures = {"flags": flags, **measured_on, "results": results}
        workdir.write_json(paths.place(arguments.json), figures)


def run_convert(arguments: argparse.Namespace) -> None:
    """Write a model directory, or with --to a file of PyTorch names."""
    from kdgqa_jax import convert
    from kdgqa_jax.console import say, table

    workdir.check_new(arguments.out)
    given = flags.given(arguments, {**flags.CONVERT_OPTIONS, **flags.CALIBRATION_OPTIONS})
    if arguments.to and given:
        raise UserError(
            f"--to writes a model directory as it is; {', '.join(given)} belong to a conversion"
            " without --to"
        )
    if arguments.to:
        convert.export(arguments.source, arguments.out, arguments.to)
        say(f"written: {arguments.out}")
        return
    options = {name: getattr(arguments, name) for name in flags.CONVERT_OPTIONS}
    options["calibration"] = _calibration(arguments)
    converted = convert.load(arguments.source, **options)
    converted.save(arguments.out)
    report = converted.report
    table(report.HEADER, report.rows())
    for note in report.notes:
        say(note)
    for warning in report.warnings:
        print(f"kdgqa convert: warning: {printable(warning)}", file=sys.stderr)
    say(f"model directory: {arguments.out}")


def _calibration(
    arguments: argparse.Namespace, options: dict[str, dict] = flags.CALIBRATION_OPTIONS
) -> Any:
    """Where calibration images come from; None without --calibration."""
    from kdgqa_jax.convert import CalibrationImages

    if not arguments.calibration:
        given = flags.given(arguments, options)
        if given:
            raise UserError(f"{', '.join(given)} need --calibration (a data set or a folder)")
        return None
    place = (arguments.calibration, arguments.data_dir, arguments.calibration_images)
    return CalibrationImages(*place, seed=arguments.seed)


def run_merge_encoder(arguments: argparse.Namespace) -> None:
    """Write an encoder's directory with fewer key/value heads."""
    from kdgqa_jax import convert
    from kdgqa_jax.console import say, table
    from kdgqa_jax.convert import merging_encoder

    workdir.check_new(arguments.out)
    given = flags.given(arguments, flags.ENCODER_OPTIONS)
    if given and not arguments.calibration:
        raise UserError(f"{', '.join(given)} need --calibration (a .txt or .npy file)")
    merged = convert.merge_encoder(
        arguments.source,
        arguments.num_kv_heads,
        arguments.pooling,
        arguments.calibration,
        count=arguments.calibration_inputs,
        seed=arguments.seed,
    )
    merged.save(arguments.out)
    if rows := merged.rows():
        table(merging_encoder.HEADER, rows, numbers=True)
    for note in merged.notes:
        say(note)
    say(f"written: {arguments.out}")


def run_predict(arguments: argparse.Namespace) -> None:
    """Predictions of images, as a table or a file."""
    from kdgqa_jax import predict
    from kdgqa_jax.console import say, table

    out, features = arguments.out, arguments.features
    predict.check_output(out, features)
    asked = arguments.images, arguments.batch_size
    needs_classes = not out or not out.endswith(".npy")
    if arguments.exported:
        if features:
            raise UserError("--features belongs to --checkpoint: an exported function has logits")
        from kdgqa_jax import exported

        names, output, classes = exported.predict_files(
            arguments.exported, *asked, needs_classes=needs_classes
        )
        groupings = []
    else:
        names, predictions, classes = predict.predict_files(
            arguments.checkpoint, *asked, features, needs_classes=needs_classes
        )
        output, groupings = predictions.output, predict.describe_allocation(predictions.allocation)
    if out:
        predict.write(out, names, output, classes, arguments.top)
        say(f"{len(names)} images, written: {out}")
    else:
        top = predict.top_classes(output, classes, arguments.top)
        rows = [
            [name, ", ".join(f"{label} {100 * p:.1f} %" for label, p in best)]
            for name, best in zip(names, top, strict=True)
        ]
        table(("image", f"top {arguments.top}"), rows)
    for line in groupings:
        say(line)


def run_export(arguments: argparse.Namespace) -> None:
    """Write a model as a function, or in ONNX."""
    from kdgqa_jax import exported, exported_onnx
    from kdgqa_jax.console import say

    workdir.check_new(arguments.out)
    place, scope = arguments.out, arguments.allocation_scope
    if place.endswith(exported_onnx.SUFFIX):
        if arguments.platforms is not None:
            raise UserError("--platforms belongs to .npz files; ONNX is for no platform")
        exported_onnx.export(arguments.checkpoint, place, scope)
        say(f"written: {place}, checked with ONNX Runtime; any batch size")
        return
    platforms = exported.DEFAULT_PLATFORMS
    if arguments.platforms is not None:
        platforms = [name for name in arguments.platforms.split(",") if name]
    exported.export(arguments.checkpoint, place, platforms, scope)
    say(f"written: {place}, for {', '.join(platforms)}; any batch size")


def run_card(arguments: argparse.Namespace) -> None:
    """Write a model card."""
    from kdgqa_jax import card
    from kdgqa_jax.console import say

    place = card.write(arguments.checkpoint, arguments.out, arguments.results, arguments.license)
    say(f"written: {place}")


def run_evaluate(arguments: argparse.Namespace) -> None:
    """Figures on a data set, or of a probe, as lines and a file."""
    from kdgqa_jax import logs, predict
    from kdgqa_jax.console import say, table

    _check_json("--out", arguments.out)
    if arguments.seed and arguments.probe != "linear":
        raise UserError("--seed belongs to --probe linear")
    result, class_names = _figures(arguments)
    by_class = result.pop("per_class", None)
    rows = []
    if by_class:
        rows = list(zip(class_names, by_class["count"], by_class["top1"], strict=True))
        result["per_class"] = [{"class": n, "count": c, "top1": top1} for n, c, top1 in rows]
    if arguments.out:
        about = ("checkpoint", "dataset", "split", "shift")
        about = {name: getattr(arguments, name) for name in about}
        workdir.write_json(paths.place(arguments.out), logs.valid_json({**about, **result}))
    figures = [f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %"]
    if result["loss"] is not None:
        figures.append(f"loss {result['loss']:.4f}")
    if "calibration_error" in result:
        figures.append(f"expected calibration error {result['calibration_error']:.2f} %")
    what = f"{arguments.probe} probe on " if arguments.probe else ""
    figures.append(f"{result['count']:,} images")
    say(f"{what}{arguments.dataset} {arguments.split}: {', '.join(figures)}")
    if rows:
        shown = [[n, f"{c:,}", "" if top1 is None else f"{top1:.2f}"] for n, c, top1 in rows]
        table(("class", "images", "top-1 %"), shown, numbers=True)
    if "allocation" in result:
        for line in predict.describe_allocation([result["allocation"]]):
            say(line)
    if arguments.out:
        say(f"written: {arguments.out}")


def _figures(arguments: argparse.Namespace) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(figures, class names) of the model, or of a probe of its features."""
    given = (arguments.checkpoint, arguments.dataset)
    options = {
        "data_dir": arguments.data_dir,
        "shift": arguments.shift,
        "batch_size": arguments.batch_size,
        "per_class": arguments.per_class,
    }
    if not arguments.probe:
        from kdgqa_jax import evaluate

        names = not arguments.ignore_class_names
        return evaluate.evaluate_directory(
            *given, **options, split=arguments.split, compare_names=names
        )
    from kdgqa_jax import probes

    if arguments.split != "test":
        raise UserError("--probe is fitted to the training images; leave --split train out")
    if arguments.ignore_class_names:
        raise UserError("--probe reads no class names of the model; leave --ignore-class-names out")
    return probes.probe_directory(*given, arguments.probe, **options, seed=arguments.seed)


def _check_json(flag: str, path: str | None) -> None:
    if path and not path.endswith(".json"):
        raise UserError(f"{flag} {path}: results are JSON; give a name that ends in .json")


def run_inspect(arguments: argparse.Namespace) -> None:
    """What a model directory holds, or how few key/value heads would do."""
    from kdgqa_jax import analysis, convert
    from kdgqa_jax.console import say, table

    share = arguments.suggest_kv_heads
    if share is None:
        if given := flags.given(arguments, flags.SUGGESTION_OPTIONS):
            raise UserError(f"{', '.join(given)} belong to --suggest-kv-heads SHARE")
        facts, rows = analysis.summarise(arguments.checkpoint)
        table(("", arguments.checkpoint), facts)
        table(analysis.LAYER_HEADER, rows)
        return
    calibration = _calibration(arguments, flags.SUGGESTION_OPTIONS)
    rows, by = convert.suggest_kv_heads(arguments.checkpoint, share, calibration)
    table(convert.SUGGESTION_HEADER, rows, numbers=True)
    say(by)


def run_analyse(arguments: argparse.Namespace) -> None:
    """How alike the heads of a model are, its key norms and allocations."""
    from kdgqa_jax import analysis, workdir
    from kdgqa_jax.console import say, table
    from kdgqa_jax.report import heads

    out = workdir.check_new(arguments.out)
    scales = arguments.noise_scales or analysis.NOISE_SCALES
    found, model, groups = analysis.analyse_directory(
        arguments.checkpoint,
        arguments.images,
        arguments.data_dir,
        arguments.count,
        scales,
        arguments.batch_size,
        arguments.seed,
    )
    about = ("checkpoint", "images", "count", "batch_size", "seed")
    about = {name: getattr(arguments, name) for name in about}
    heads.write(found, groups, model, out, about)
    alike = heads.similarity_table(found)
    table(alike.header, alike.rows, "cosines of query heads", numbers=True)
    say(f"{len(found.key_norms)} images; written: {out}")
