"""What a run reports: its plan and result on the terminal, its model card, and report.html."""

# N = points of a curve

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, assert_never

import torch

from yrunner.assembly.dataset import data_name, unit_of
from yrunner.assembly.distillation.teacher import teacher_in_words
from yrunner.assembly.measure import Measured
from yrunner.assembly.rl.rollouts import read_rollouts
from yrunner.assembly.run import Run
from yrunner.assembly.trainer import critic_in_words, reference_in_words
from yrunner.console import Cell, counted, print_table, say, warn
from yrunner.data.batching.plan import Plan, epoch_after
from yrunner.evaluation.scorers import headline_of
from yrunner.losses.nlirg import zone_edges
from yrunner.models.save import ModelCard
from yrunner.models.tuning import count_parameters
from yrunner.recipe.load import base_recipe_path, recipe_to_yaml
from yrunner.recipe.schema.eval import AnswerTask
from yrunner.recipe.schema.recipe import (
    DftLoss,
    EaftLoss,
    NlirgEntropyLoss,
    NlirgLoss,
    PlainLoss,
    Recipe,
    TokenLoss,
)
from yrunner.reports import plots
from yrunner.reports.html import (
    Answer,
    Answers,
    Block,
    Code,
    KeyFigures,
    Plot,
    Report,
    Table,
    write_report,
)
from yrunner.rewards.facts import first_and_last
from yrunner.storage.run_dir import RunDir, read_json, write_json
from yrunner.training.arguments import token_weight
from yrunner.training.metrics import read_metrics, validation_losses

NUM_POINTS = 801
EARLY = 0.7
"""Share of the updates: a result before it is worth a look."""
STILL_FALLING = 0.95
"""Training loss after the result, as a share of that before it."""
SHOWN_ANSWERS = 10


DRIFT_CAPTION = (
    "Above: the plain loss on the domain's validation rows. Below: how far the model has moved "
    "from its base on rows that the base wrote, as KL(base || tuned). Where the lower curve rises "
    "while the upper one stays flat, the run forgets without learning."
)
TEACHER_CAPTION = (
    "The divergence that teacher.by names, at teacher.temperature, without its weight in the loss."
)
REWARD_CAPTION = (
    "Above: the share of pairs whose better answer has the higher reward. Below: how much more "
    "likely the answers have become than under the reference, in nats per answer. Where the upper "
    "of these curves falls below zero, the better answers are unlearned too."
)
ROLLOUT_CAPTION = (
    "Above: the mean reward of the answers, and that on the validation prompts, which chooses the "
    "checkpoint. Below: the share of groups whose answers all got the same reward, which teach "
    "nothing, and of answers that were cut off."
)
DRAWN_CAPTION = (
    "What the rewards said of the answers of the first and of the last twentieth of the cycles, "
    "before their weights."
)
CRITIC_CAPTION = (
    "Above: the critic's loss. Below: the share of the variance of the returns that its values, as "
    "they were before the update, explain: 0 for a constant, below it the values are only noise."
)
WEIGHT_CAPTION = (
    "Above: the weight of a target's gradient by its loss. Below: the losses of the same targets "
    "before and after training."
)


def say_plan(run: Run, model: Any, plan: Plan) -> None:
    """Print the plan of the run: model, trainable share, rows, updates."""
    recipe, train, prepared = run.recipe, run.recipe.train, run.dataset
    trained, total = count_parameters(model)
    # An adapter's weights are not the model's.
    is_beside = recipe.tuning.kind in ("lora", "qlora")
    own = total - trained if is_beside else total
    each = counted(plan.rows_of_an_update, unit_of(recipe))
    share = f"{'beside' if is_beside else 'of'} them ({trained / own:.2%})"
    rows = [
        ("model", f"{recipe.model.base or 'from scratch'}, {own:,} parameters"),
        ("trained", f"{trained:,} {share}, tuning {recipe.tuning.kind}"),
        ("precision", _precision(run)),
        ("rows", f"{len(prepared.train):,} training, {len(prepared.validation):,} validation"),
        ("updates", f"{plan.num_updates:,} ({_epochs(plan)}, {each} each)"),
        ("keep", _keep(recipe, plan)),
        ("loss", f"{recipe.loss.kind}, {_targets_of_update(train.token_batch)} per update"),
        *([("reference", reference)] if (reference := reference_in_words(recipe)) else []),
        *([("critic", critic)] if (critic := critic_in_words(recipe)) else []),
        *([("teacher", teacher)] if (teacher := teacher_in_words(run)) else []),
        ("learning rate", f"{train.learning_rate:g}, {train.lr_scheduler}, {train.optimizer}"),
        ("folder", str(recipe.run_folder)),
    ]
    print_table("Run", (recipe.name, ""), rows)


def record_result(run: Run, step: int, last: int) -> None:
    """Write which update `model/` is, and why."""
    losses = validation_losses(read_metrics(run.folder.metrics))
    if run.recipe.train.result == "last":
        why = "train.result: last"
    elif not losses:
        why = "the last, as there is no validation"
    elif step == min(losses, key=lambda each: (losses[each], each)) and run.recipe.rewards:
        why = f"the highest validation reward, {-losses[step]:.4f}"
    elif step == min(losses, key=lambda each: (losses[each], each)):
        why = f"the lowest validation loss, {losses[step]:.4f}"
    else:
        why = "the last, as the best checkpoint is damaged"
    write_json(run.folder.result, {"step": step, "last": last, "why": why})


def result_in_words(run_dir: RunDir) -> str:
    """Which update `model/` is, such as "update 100 of 200: the lowest validation loss, 0.7894".

    Empty for a run that did not record it.
    """
    if not run_dir.result.exists():
        return ""
    record = read_json(run_dir.result)
    return f"update {record['step']:,} of {record['last']:,}: {record['why']}"


def warn_of_early_result(run: Run) -> None:
    """Warn if validation chose an early update although the training loss fell on after it.

    Then the rest of the training either repeats its rows by heart, or the validation rows are too
    few or too unlike them to judge it.
    """
    if run.recipe.train.stage == "rl":
        # The loss of a policy says nothing about what it has learned.
        return
    records = read_metrics(run.folder.metrics)
    record = read_json(run.folder.result)
    step, last = record["step"], record["last"]
    losses = validation_losses(records)
    learned = [(row["step"], row["loss"]) for row in records if "loss" in row]
    until = [loss for at, loss in learned if at <= step]
    later = [loss for at, loss in learned if at > step]
    if step > EARLY * last or not until or not later or last not in losses:
        return
    # As many logs on both sides: one of them is noisy.
    number = min(len(until), len(later))
    then, now = mean(until[-number:]), mean(later[-number:])
    if now < STILL_FALLING * then:
        warn(
            f"the model is update {step:,} of {last:,}: after it the training loss still fell "
            f"({then:.3f} to {now:.3f}), the validation loss rose ({losses[step]:.4f} to "
            f"{losses[last]:.4f}). Train fewer epochs or more rows; to keep the last update, set "
            "train.result: last"
        )


def say_result(run: Run, before: Measured, after: Measured) -> None:
    """Print the results of the run, and where they are."""
    print_tasks(run.recipe, before, after)
    if drawn := drawn_table(run):
        print_table(drawn.title, drawn.columns, drawn.rows)
    which = result_in_words(run.folder)
    say(f"model:  {run.folder.model}{which and f' ({which})'}")
    say(f"report: {run.folder.report}")
    warn_of_early_result(run)


def drawn_table(run: Run) -> Table | None:
    """What the rewards said of a run's answers at its beginning and at its end.

    None for other stages, and for a run of a single cycle.
    """
    rewards = run.recipe.rewards
    found = first_and_last(read_rollouts(run.folder.rollouts), rewards) if rewards else None
    if found is None:
        return None
    first, last = found
    rows: list[tuple[Cell, ...]] = [
        (
            each.shown_name,
            _from_to(first.means.get(each.shown_name), last.means.get(each.shown_name), ".3f"),
            _from_to(first.whole.get(each.shown_name), last.whole.get(each.shown_name), ".1%"),
        )
        for each in rewards
    ]
    rows.append(("sum, less penalties", _from_to(first.reward, last.reward, ".3f"), None))
    title = f"Answers drawn: the first {first.answers:,}, and the last {last.answers:,}"
    return Table(title, ("reward", "mean", "full marks"), rows, DRAWN_CAPTION)


def _from_to(first: float | None, last: float | None, form: str) -> str | None:
    if first is None or last is None:
        return None
    return f"{first:{form}} to {last:{form}}"


def say_next(run: Run) -> None:
    """Print useful next commands."""
    recipe, arguments = run.recipe, run.options.arguments
    say("")
    if recipe.train.stage == "reward":
        say(f'AutoModelForSequenceClassification.from_pretrained("{run.folder.model}")  # loads it')
        return
    say(f"yrun chat {arguments}    # chat with it")
    if run.eval_tasks or recipe.eval.faults is not None:
        say(f"yrun eval {arguments}    # compare base and result")
    if recipe.tuning.kind in ("lora", "qlora"):
        say(f"yrun merge {arguments}   # merge base and adapter")


def print_tasks(recipe: Recipe, before: Measured | None, after: Measured) -> None:
    """Print the main figure of each task."""
    rows = _task_rows(recipe, before, after)
    if rows:
        columns = ("task", "side", "questions", "figure", "before", "after")
        print_table("Answers", columns, rows)


def model_card(run: Run, before: Measured, after: Measured, **origin: Any) -> ModelCard:
    """The model card; `origin`: fields that only some cards have."""
    recipe = run.recipe
    figures = [
        (f"{name}: {figure}", f"{now} (before: {then})")
        for name, _, _, figure, then, now in _task_rows(recipe, before, after)
    ]
    which = result_in_words(run.folder)
    if which:
        figures.insert(0, ("weights", which))
    base_recipe = base_recipe_path(recipe)
    return ModelCard(
        name=recipe.name,
        base=base_recipe.name if base_recipe else recipe.model.base,
        tuning=recipe.tuning.kind,
        recipe=recipe_to_yaml(recipe),
        figures=figures,
        dataset_files=[data_name(entry) for entry in recipe.data.train],
        is_reward=recipe.train.stage == "reward",
        rank=getattr(recipe.tuning, "rank", None),
        template_args=recipe.model.template_args,
        **origin,
    )


def write_run_report(run: Run, before: Measured, after: Measured) -> None:
    """Write report.html: figures, curves, zones, the weight curve, answers before and after."""
    recipe, run_dir = run.recipe, run.folder
    records = read_metrics(run_dir.metrics)
    blocks: list[Block] = [
        KeyFigures(_key_figures(run, before, after, records)),
        *_loss_plots(recipe, records),
        *([drawn] if (drawn := drawn_table(run)) else []),
        *_teacher_plots(records),
        *drift_plots(records),
        *(_weight_plots(recipe, records, before, after) if recipe.learns_from_tokens else []),
        Plot("Learning rate", plots.learning_rate(records)),
        *_answer_blocks(recipe, before, after),
        Code("Recipe", recipe_to_yaml(recipe)),
    ]
    write_report(Report(recipe.name, blocks, subtitle="yrunner"), run_dir.report)


def _loss_plots(recipe: Recipe, records: Sequence[Mapping[str, Any]]) -> list[Plot]:
    if recipe.train.stage == "rl":
        found = [Plot("Reward", plots.rollout_curves(records), ROLLOUT_CAPTION)]
        if any("value_loss" in record for record in records):
            found.append(Plot("Critic", plots.critic_curves(records), CRITIC_CAPTION))
        return found
    if not recipe.learns_from_pairs:
        caption = "The checkpoint is chosen by plain loss."
        return [Plot("Loss", plots.loss_curves(records), caption)]
    unit = _unit_of_loss(recipe)
    caption = f"Loss {unit}. The checkpoint is chosen by its value on the validation rows."
    curves = plots.loss_curves(records, unit=unit)
    return [
        Plot("Loss", curves, caption),
        Plot("Rewards", plots.reward_curves(records), REWARD_CAPTION),
    ]


def _weight_plots(
    recipe: Recipe, records: Sequence[Mapping[str, Any]], before: Measured, after: Measured
) -> list[Plot]:
    weights = weight_plot(recipe.token_loss, before=before.token_losses, after=after.token_losses)
    return [
        Plot(
            "Zones",
            plots.zones_over_time(records),
            "Shares of easy, learnable, hard and refused targets.",
        ),
        Plot("Weight by loss", weights, WEIGHT_CAPTION),
    ]


def _unit_of_loss(recipe: Recipe) -> str:
    if not recipe.learns_from_pairs:
        return "nats per target"
    return "per answer" if recipe.loss.kind == "kto" else "per pair"


def shown_entropies(loss: TokenLoss) -> dict[str, float]:
    """The names of a loss's curves, and the entropy in nats of each.

    One curve if the weight depends on the loss alone.
    """
    match loss:
        case PlainLoss() | NlirgLoss() | DftLoss():
            return {"any entropy": 0.0}
        case NlirgEntropyLoss():
            return {f"entropy {nats} nats": float(nats) for nats in (0, 1, 3)}
        case EaftLoss():
            return {f"entropy {nats} nats of the top 20": nats for nats in (0.5, 1.5, 2.9)}
        case _:
            assert_never(loss)


def weight_plot(
    loss: TokenLoss, *, before: Sequence[float] = (), after: Sequence[float] = ()
) -> str:
    """The curves as SVG; `before` and `after` are losses of targets before and after training."""
    weight, loss_deadline = token_weight(loss)
    losses_N = torch.linspace(0, plots.HIGHEST_LOSS, NUM_POINTS)
    curves = {
        name: weight.of(losses_N, torch.full_like(losses_N, entropy)).tolist()
        for name, entropy in shown_entropies(loss).items()
    }
    edges = zone_edges(loss_deadline)
    return plots.weight_curve(
        losses_N.tolist(), curves, zone_edges=edges, before=before, after=after
    )


def drift_plots(records: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Validation loss above drift; nothing if drift was not measured."""
    if not _measured(records):
        return []
    return [Plot("Learned and forgotten", plots.drift_curve(records), DRIFT_CAPTION)]


def _teacher_plots(records: Sequence[Mapping[str, Any]]) -> list[Plot]:
    if not any("teacher_divergence" in record for record in records):
        return []
    return [Plot("Distance to the teacher", plots.teacher_curve(records), TEACHER_CAPTION)]


def drift_figures(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """The drift at the last validation."""
    measured = _measured(records)
    if not measured:
        return []
    note = "nats per token, on rows that the base wrote; last validation"
    return [("drift", f"{measured[-1]['eval_drift']:.4f}", note)]


def _measured(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [record for record in records if "eval_drift" in record]


def _precision(run: Run) -> str:
    """The dtype, and why, where nobody has named it."""
    is_named = run.recipe.model.dtype != "auto"
    return run.precision.name + ("" if is_named else f" ({run.precision.why})")


def _epochs(plan: Plan) -> str:
    epochs = epoch_after(plan.num_updates, plan.epoch_ends)
    return "1 epoch" if epochs == 1 else f"{epochs:.4g} epochs"


def _keep(recipe: Recipe, plan: Plan) -> str:
    if not plan.kept:
        return recipe.keep.kind
    return f"{recipe.keep.kind}, {counted(plan.kept, 'more row')} per update"


def _targets_of_update(token_batch: int) -> str:
    return f"{counted(token_batch, 'target')} of each example" if token_batch else "all targets"


def _task_rows(
    recipe: Recipe, before: Measured | None, after: Measured
) -> list[tuple[str, str, int, str, str, str]]:
    """Task, side, number of questions, and the main figure by name, before and after."""
    found: list[tuple[str, str, int, str, str, str]] = []
    for task in recipe.eval.tasks:
        rows = after.answers.get(task.name)
        if rows is None or not isinstance(task, AnswerTask):
            continue
        figure = headline_of(task, [row.reference for row in rows])
        then = f"{before.score(task.name, figure):.1%}" if before else "–"
        now = f"{after.score(task.name, figure):.1%}"
        found.append((task.name, task.side, len(rows), figure, then, now))
    return found


def _key_figures(
    run: Run, before: Measured, after: Measured, records: list[Any]
) -> list[tuple[str, str, str]]:
    recipe = run.recipe
    figures = [
        (name, now, f"{figure}, {counted(count, 'question')}; {then} before")
        for name, _, count, figure, then, now in _task_rows(recipe, before, after)
    ]
    losses = validation_losses(records)
    record = read_json(run.folder.result) if run.folder.result.exists() else {}
    if record.get("step") in losses:
        note, name = f"{_unit_of_loss(recipe)}, at update {record['step']:,}", "validation loss"
        value = losses[record["step"]]
        if recipe.train.stage == "rl":
            note, name, value = f"at update {record['step']:,}", "validation reward", -value
        figures.append((name, f"{value:.4f}", note))
    if distances := [row["teacher_divergence"] for row in records if "teacher_divergence" in row]:
        note = "nats per target, on training rows; last record"
        figures.append(("from the teacher", f"{distances[-1]:.4f}", note))
    figures += drift_figures(records)
    steps = [record["step"] for record in records if "loss" in record]
    figures.append(("updates", f"{max(steps, default=0):,}", f"loss: {recipe.loss.kind}"))
    if record:
        figures.append(("model", f"update {record['step']:,}", record["why"]))
    return figures


def _answer_blocks(recipe: Recipe, before: Measured, after: Measured) -> list[Answers]:
    """Ten answers of each task, those that changed first.

    They are right or wrong where the main figure knows nothing between.
    """
    headlines = {name: figure for name, _, _, figure, _, _ in _task_rows(recipe, None, after)}
    blocks = []
    for name, rows in after.answers.items():
        figure = headlines.get(name, "exact")
        graded = figure in ("exact", "contains")
        answers = [
            Answer(
                now.question,
                now.reference,
                then.answer,
                now.answer,
                bool(then.score(figure)) if graded else None,
                bool(now.score(figure)) if graded else None,
            )
            for then, now in zip(before.answers[name], rows, strict=True)
        ]
        answers.sort(key=lambda answer: answer.before == answer.after)
        blocks.append(Answers(f"Answers: {name}", answers[:SHOWN_ANSWERS]))
    return blocks
