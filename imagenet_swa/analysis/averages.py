"""Every average of a finished run's captures side by side, at no extra training: one table, with the gains' intervals."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from imagenet_swa.analysis.answers import ENSEMBLE, ask, fitting, gain_cells, make_output, top1_gain
from imagenet_swa.analysis.average_plots import plot_averages
from imagenet_swa.analysis.captures import RunWeights
from imagenet_swa.analysis.soups import (
    Members,
    Recipe,
    Trial,
    averaged_names,
    averaged_run,
    distinct,
    greedy_soup,
    recipes_of,
    soup_of,
    weighted_mean,
)
from imagenet_swa.averaging import WeightAverage
from imagenet_swa.config import Config, InputError, require
from imagenet_swa.evaluate import Evaluation
from imagenet_swa.files import write_atomically
from imagenet_swa.models import Weights, read_weights
from imagenet_swa.plain import parse_json, read_text
from imagenet_swa.report import markdown_table
from imagenet_swa.session import Session

COLUMNS = ("network", "top-1 %", "NLL", "over pretrained, points [95 %]", "p", "over last capture, points [95 %]", "p")


@dataclass(frozen=True, kw_only=True)
class AveragesSettings:
    """Which averages of a run's captures are compared, and how"""

    ema_decays: tuple[float, ...] = (0.5, 0.7, 0.9)
    """Exponential moving averages over the captures, started from the pretrained weights: share of the old average at each
    capture."""
    lawa_sizes: tuple[int, ...] = (3, 5)
    """Averages of the last so many captures (LAWA)."""
    greedy: bool = True
    """Also the greedy soup of the captures, chosen on the training images that data.num_held_out kept out of the training; one
    pass over the training images per capture."""
    ensemble: bool = True
    """Also the ensemble of all captures: the mean of their class probabilities, as many times the cost at test time."""
    num_batchnorm_images: int | None = None
    """Training images that give each average its BatchNorm statistics; default: the run's batchnorm.num_images."""
    networks_per_pass: int = 16
    """Networks in the device's memory at a time, which share a pass over the images."""
    output: Path | None = None
    """Folder of averages.json, averages.md and averages.png; default: RUN/averages-table."""

    def __post_init__(self) -> None:
        for decay in self.ema_decays:
            require(0 < decay < 1, f"averages.ema_decays must be between 0 and 1, got {decay:g}")
        for size in self.lawa_sizes:
            require(size >= 1, f"averages.lawa_sizes must be at least 1, got {size}")
        number = self.num_batchnorm_images
        require(number is None or number >= 2, f"averages.num_batchnorm_images must be at least 2, got {number}")
        require(self.networks_per_pass >= 1, f"averages.networks_per_pass must be at least 1, got {self.networks_per_pass}")


@dataclass(frozen=True)
class Score:
    """What counts of a network's answers: (N,) whether each image is right, and the mean NLL in nats."""

    correct: NDArray[np.bool_]
    nll: float


def averages(config: Config, settings: AveragesSettings, say: Callable[[str], None] = print) -> Path:
    """Compare all averages of the captures of the run in `config.output`; returns the path of averages.md.

    Raises:
        InputError: no finished run with an average and all its captures, weights of another network, or held-out images that
            the run did not hold out.
    """
    run = averaged_run(config.output)
    _check_held_out(run, config)
    session = Session.open(config)
    folder = make_output(session, settings.output or config.output / "averages-table", "averages.output")
    scorer = Scorer(session, run, settings, say)
    soup, trials = scorer.greedy_soup()
    recipes, also = distinct(
        recipes_of(len(run.captures), ema_decays=settings.ema_decays, lawa_sizes=settings.lawa_sizes, soup=soup)
    )
    scores = scorer.scores(recipes)
    num_images = len(scores[recipes[0]].correct)
    if num_images < len(session.indices[1]):
        scorer.notes.append(f"{len(session.indices[1]) - num_images} validation images were left out: they cannot be decoded.")
    if session.runtime.is_main:
        record = {
            "run": str(run.folder),
            "network": config.model.name,
            "num_captures": len(run.captures),
            "captures": [capture.name for capture in run.captures],
            "num_images": num_images,
            "num_batchnorm_images": scorer.num_batchnorm_images,
            "notes": scorer.notes,
            "greedy_soup": [trial | {"capture": run.captures[trial["capture"]].name} for trial in map(asdict, trials)],
            "rows": _rows(scores, also, seed=config.seed),
        }
        _write(record, folder)
        say(_table(record))
        say(f"table: {folder / 'averages.md'}\nplot:  {folder / 'averages.png'}")
    session.runtime.barrier()
    return folder / "averages.md"


def _check_held_out(run: RunWeights, config: Config) -> None:
    """A soup chosen on images that the run has trained on would be chosen by how well it knows them by heart."""
    held_out, wanted = run.config["data"].get("num_held_out", 0), config.data.num_held_out
    require(
        held_out == wanted,
        f"data.num_held_out is {wanted}, but {run.folder} was trained with {held_out}: its training has seen other images; "
        "leave the setting out",
    )


def _fingerprint(run: RunWeights) -> str:
    """Of the images that the run has trained on."""
    path = run.folder / "environment.json"
    try:
        return parse_json(read_text(path))["data"]["train"]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} is missing or damaged; it says which images the run has trained on") from None


class Scorer:
    """Makes the networks of recipes and asks them about the validation images, many in one pass."""

    def __init__(self, session: Session, run: RunWeights, settings: AveragesSettings, say: Callable[[str], None]) -> None:
        self.session, self._run, self._settings = session, run, settings
        self._say = say if session.runtime.is_main else lambda _line: None
        self._names = averaged_names(session.network)
        paths = [run.pretrained_path, *(capture.path for capture in run.captures)]
        self._models = [partial(fitting, session, path) for path in paths]
        self._running = WeightAverage(session.network)
        self._running.start_from(self._models[0]())
        self.num_batchnorm_images = 0
        num_captures = len(run.captures)
        too_large = [size for size in settings.lawa_sizes if size > num_captures]
        self.notes = [f"No LAWA of the last {size}: there are {num_captures} captures." for size in too_large]
        self._same_images = _fingerprint(run) == session.indices[0].fingerprint
        if not self._same_images:
            self.notes.append("The training images are not those that the run was trained on (another fingerprint).")

    def greedy_soup(self) -> tuple[Members, list[Trial]]:
        """The soup's captures and what was tried, both empty where no images can choose it."""
        if not self._settings.greedy:
            return (), []
        if self.session.loaders.held_out is None:
            self.notes.append(
                "No greedy soup: the run held no training images out to choose it by; a run with data.num_held_out does, "
                "such as 10000 of ImageNet's."
            )
            return (), []
        if not self._same_images:
            self.notes.append("No greedy soup: which images were held out cannot be told; name those of the run as data.train.")
            return (), []
        soup, trials = greedy_soup(len(self._run.captures), self._num_correct_held_out)
        chosen = ", ".join(self._run.captures[k].name for k in soup)
        self._say(f"greedy soup, chosen on {len(self.session.loaders.held_out.index):,} held-out training images: {chosen}")
        return soup, trials

    def _num_correct_held_out(self, soups: Sequence[Members]) -> list[int]:
        recipes = [soup_of(members, len(self._run.captures)) for members in soups]
        return [evaluation.num_correct for group in self._groups(recipes) for evaluation in self._evaluate(group, "held_out")]

    def scores(self, recipes: Sequence[Recipe]) -> dict[Recipe, Score]:
        """The scores of all recipes, in their order."""
        found: dict[Recipe, Score] = {}
        members = {recipe.title: recipe for recipe in recipes if recipe.kind == "capture"}
        together = [recipe for recipe in recipes if recipe.kind == "ensemble"]
        if self._settings.ensemble and len(members) > 1:
            load = {title: self._models[recipe.num_captures] for title, recipe in members.items()}
            answers = ask(self.session, load, {}, networks_per_pass=self._settings.networks_per_pass, say=self._say)
            for name, recipe in {**members, ENSEMBLE: together[0]}.items():
                found[recipe] = Score(answers.of[name].correct, answers.of[name].nll)
        # Prefixes by their length, for one running average; captures last, those with a score already not again.
        waiting = [recipe for recipe in recipes if recipe not in found and recipe.kind != "ensemble"]
        waiting.sort(key=lambda recipe: (recipe.is_average, recipe.num_captures))
        for group in self._groups(waiting):
            for recipe, evaluation in zip(group, self._evaluate(group, "val"), strict=True):
                found[recipe] = Score(evaluation.ranked[:, 0] == evaluation.labels, evaluation.nll)
        return {recipe: found[recipe] for recipe in recipes if recipe in found}

    def _groups(self, recipes: Sequence[Recipe]) -> list[Sequence[Recipe]]:
        size = self._settings.networks_per_pass
        return [recipes[start : start + size] for start in range(0, len(recipes), size)]

    def _evaluate(self, recipes: Sequence[Recipe], split: Literal["val", "held_out"]) -> list[Evaluation]:
        """One pass over the training images for the averages' BatchNorm statistics, one over the split's."""
        networks = {str(number): self.session.network_with(self.weights(recipe)) for number, recipe in enumerate(recipes)}
        in_need = [network for network, recipe in zip(networks.values(), recipes, strict=True) if recipe.is_average]
        if in_need:
            last = self._run.last_result
            self.num_batchnorm_images = self.session.recompute_batchnorm(
                in_need,
                epoch=int(last["epoch"]),  # the very images that the run's own averages have seen
                step=last["step"],
                num_images=self._settings.num_batchnorm_images or self.session.config.batchnorm.num_images,
            )
        evaluations = list(self.session.evaluate(networks, split=split).values())
        split_name = "validation" if split == "val" else "held-out"
        self._say(f"evaluated on the {split_name} images: {'; '.join(recipe.title for recipe in recipes)}")
        return evaluations

    def weights(self, recipe: Recipe) -> Weights:
        """The network's parameters, and the buffers of the last weights that went in; averages lack BatchNorm statistics."""
        if recipe.kind in ("with_pretrained", "captures_only"):
            return self._running_average(recipe.num_captures, include_pretrained=recipe.kind == "with_pretrained")
        if recipe.is_average:
            return weighted_mean(self._models, recipe.coefficients, self._names)
        return self._models[recipe.num_captures]()

    def _running_average(self, num_captures: int, *, include_pretrained: bool) -> Weights:
        """As the run itself had it after so many captures, to the last bit."""
        if self._running.num_averaged > num_captures:
            self._running.start_from(self._models[0]())
        while self._running.num_averaged < num_captures:
            self._running.update(self._models[self._running.num_averaged + 1]())
        weights = self._running.weights(include_pretrained=include_pretrained)
        if num_captures == len(self._run.captures) and include_pretrained == self._run.config["swa"]["include_pretrained"]:
            kept = read_weights(self._run.swa_path)
            if not all(torch.equal(weights[name], kept[name]) for name in self._names):
                self.notes.append("The captures do not average to swa.safetensors: a capture was changed after the run.")
        return weights


# ------------------------------------------------------------------------------------------------------------ words


def _rows(scores: dict[Recipe, Score], also: dict[Recipe, list[Recipe]], *, seed: int) -> list[dict[str, Any]]:
    pretrained = next(score for recipe, score in scores.items() if recipe.kind == "pretrained")
    *_, last = (score for recipe, score in scores.items() if recipe.kind == "capture")
    rows = []
    for recipe, score in scores.items():
        same = [{"kind": other.kind, "title": other.title} for other in also.get(recipe, [])]
        row = asdict(recipe) | {"also": same, "shares": recipe.shares}
        row |= {"num_correct": int(score.correct.sum()), "top1": float(score.correct.mean()), "nll": score.nll}
        for name, over in (("over_pretrained", pretrained), ("over_last_capture", last)):
            row[name] = None if score is over else top1_gain(over.correct, score.correct, seed=seed)
        rows.append(row)
    return rows


def _write(record: dict[str, Any], folder: Path) -> None:
    write_atomically(folder / "averages.json", json.dumps(record, indent=1))
    plot_averages(record, folder / "averages.png")
    write_atomically(folder / "averages.md", averages_text(record))


def averages_text(record: dict[str, Any]) -> str:
    """The table as Markdown, with what its rows are."""
    recomputed = f"those recomputed from {record['num_batchnorm_images']:,} training images"
    kept = "those of its latest capture: the network has none to recompute, or they are frozen"
    lines = [
        f"# {record['network']}: averages of {record['num_captures']} captures",
        "",
        _table(record),
        "",
        f"{record['num_images']:,} validation images, the same for all. Gains with the paired bootstrap's 95 % interval and "
        "McNemar's p, over these images and not over seeds. **Of many rows the best one is the best partly by chance**: do not "
        "choose by this table and report the choice's row.",
        "",
        "- captures, pretrained: with their own BatchNorm statistics; "
        f"every average with {recomputed if record['num_batchnorm_images'] else kept}",
        "- Alg. 1, k: equal-weight average of the pretrained weights and the first k captures; captures only, k: without the "
        "former (with k = 1 it is the first capture, with recomputed statistics)",
        "- EMA: `a = decay * a + (1 - decay) * capture` at each capture, a being the pretrained weights at first",
        "- LAWA: equal-weight average of the last captures alone (Kaddour 2022); uniform soup: of all captures",
    ]
    if record["greedy_soup"]:
        trials = [f"{t['capture']} ({t['num_correct']}{'' if t['added'] else ', left out'})" for t in record["greedy_soup"]]
        lines.append(
            "- greedy soup (Wortsman et al. 2022): captures are offered best first and stay if the soup gets no fewer of the "
            f"held-out training images right. Offered, with the number right: {', '.join(trials)}"
        )
    if any(row["kind"] == "ensemble" for row in record["rows"]):
        lines.append("- ensemble: mean of the captures' class probabilities, a forward pass for each at test time")
    lines += [f"- {note}" for note in record["notes"]]
    return "\n".join([*lines, "", "![test error against the number of captures](averages.png)"]) + "\n"


def _table(record: dict[str, Any]) -> str:
    return markdown_table(COLUMNS, [_cells(row) for row in record["rows"]])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    names = " = ".join([row["title"], *(other["title"] for other in row["also"])])
    gains = [cell for name in ("over_pretrained", "over_last_capture") for cell in gain_cells(row[name])]
    return names, f"{100 * row['top1']:.2f}", f"{row['nll']:.4f}", *gains
