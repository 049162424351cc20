"""The report of one run: report.md, report.html and report.json in its folder."""

from pathlib import Path
from typing import Any

from imagenet_swa.config import InputError
from imagenet_swa.files import write_atomically
from imagenet_swa.report.document import Block, Bullets, Heading, Paragraph, Picture, Rows, json_text, markdown, page
from imagenet_swa.report.findings import finding_blocks
from imagenet_swa.report.gains import gain_rows, measure_gain, read_answers
from imagenet_swa.report.paper import paper_figure
from imagenet_swa.report.plots import plot_trajectory
from imagenet_swa.report.runs import RunFiles, load_run
from imagenet_swa.report.tables import COLUMNS, epochs_text, table_rows


def write_report(folder: Path) -> Path:
    """Write report.md, report.html, report.json and trajectory.png into the run folder and return the first one's path."""
    run = load_run(folder)
    plot_trajectory(run, folder / "trajectory.png")
    gains, complaint = _gains(run)
    blocks = [*_result_blocks(run), *_gain_blocks(gains, complaint), Heading("How it was made"), _description(run)]
    blocks += finding_blocks(folder)
    record = {
        "network": run.network,
        "config": run.config,
        "environment": run.environment,
        "results": run.results,
        "gains": gains,
        "without_gains_because": complaint,
    }
    write_atomically(folder / "report.json", json_text(record))
    write_atomically(folder / "report.html", page(blocks))
    path = folder / "report.md"
    write_atomically(path, markdown(blocks, folder))
    return path


def _result_blocks(run: RunFiles) -> list[Block]:
    swa, num_images = run.swa, run.results[0]["num_images"]
    kind = "epochs of SWA fine-tuning" if swa.start_epoch == 0 else f"epochs, averaged from epoch {swa.start_epoch} on"
    text = f"{num_images:,} validation images, each counted once. "
    if run.is_sgd_only:
        kind = "epochs of SGD"
        text += "Plain SGD: no weights were averaged. Captures are its weights on the way."
    else:
        text += (
            "Gains are over the pretrained network measured in this pipeline. "
            if swa.start_epoch == 0
            else "Gains are over SGD's weights where averaging began. "
        )
        text += (
            "SWA (Alg. 1) counts the pretrained weights as the first model of the average; "
            "*captures only* leaves them out. Captures are the weights at the minimum of each learning-rate cycle."
        )
    return [
        Heading(f"{run.network}: {swa.num_epochs} {kind}", 1),
        Rows(COLUMNS, table_rows(run)),
        Paragraph(text),
        Picture(run.folder / "trajectory.png", "learning rate and top-1 against step"),
    ]


def _gains(run: RunFiles) -> tuple[list[dict[str, Any]], str | None]:
    """The comparisons of the run's own networks, image by image, and why there are none; a report without them is a report."""
    swa = run.result("swa" if run.swa.include_pretrained else "swa_without_pretrained")
    if swa is None:
        return [], None
    captures = [r for r in run.results if r["name"] == "capture" and r["step"] <= swa["step"]]
    found = {"swa": swa, "pretrained": run.result("pretrained"), "capture": max(captures, key=lambda r: r["step"], default=None)}
    try:
        answers = {name: read_answers(run, result) for name, result in found.items() if result is not None}
        return [
            measure_gain(_gain_label(run, found, after, before), [run.seed], [answers[before]], [answers[after]])
            for after, before in (("swa", "pretrained"), ("capture", "pretrained"), ("swa", "capture"))
            if after in answers and before in answers
        ], None
    except InputError as error:
        return [], str(error)


def _gain_label(run: RunFiles, found: dict[str, Any], after: str, before: str) -> str:
    words = {("swa", "pretrained"): "in all", ("capture", "pretrained"): "fine-tuning", ("swa", "capture"): "averaging"}
    names = []
    for name in (after, before):
        result = found[name]
        when = epochs_text(result["epoch"])
        names.append(f"{run.title(result['name'])}, epoch {when}" if when else run.title(result["name"]))
    return f"{words[after, before]}: {names[0]} - {names[1]}"


def _gain_blocks(gains: list[dict[str, Any]], complaint: str | None) -> list[Block]:
    if complaint is not None:
        return [Heading("Gain and chance"), Paragraph(f"No comparison image by image: {complaint}.")]
    if not gains:
        return []
    text = (
        "Each pair of networks on the same images. The interval is the paired bootstrap's over images; McNemar's test, exact and "
        "two-sided, asks how often equally good networks differ at least as much. What the run gained in all is what fine-tuning "
        "gained (last capture - start) and what averaging gained (average - last capture). One run says nothing of other seeds."
    )
    return [Heading("Gain and chance"), gain_rows(gains), Paragraph(text)]


def _description(run: RunFiles) -> Bullets:
    swa, data, environment = run.config["swa"], run.environment["data"], run.environment
    machine = ", ".join(environment["gpus"]) or environment["cpu"]
    length = f"steps per cycle: {swa['cycle_steps']}" if swa.get("cycle_steps") else f"epochs per cycle: {swa['cycle_epochs']}"
    items = [
        f"learning rate: {swa['schedule']}, {swa['lr_max']:g} to {swa['lr_min']:g}, {length}; "
        f"global batch {run.config['global_batch_size']}, seed {run.seed}",
        f"training images: {data['train']['num_images']:,}, fingerprint {data['train']['fingerprint'][:16]}; "
        f"validation images: {data['val']['num_images']:,}, fingerprint {data['val']['fingerprint'][:16]}",
        f"machine: {machine}; processes: {environment['world_size']}; "
        + ", ".join(f"{name} {version}" for name, version in environment["versions"].items()),
    ]
    num_left_out = max(result.get("num_left_out", 0) for result in run.results)
    if num_left_out:
        items.append(f"**{num_left_out} validation images were left out**: they cannot be decoded (bad-images-rank-*.tsv)")
    if paper_figure(run.network, "pretrained", 0, num_classes=run.config["model"]["num_classes"]):
        items.append(
            "paper: Izmailov et al. 2018, Table 2, mean ± standard deviation of 3 runs; its pretrained column is from the "
            "torchvision documentation of its time, not a measurement, so compare gains rather than levels"
        )
    return Bullets(items)
