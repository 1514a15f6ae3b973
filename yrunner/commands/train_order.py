"""How a training was asked for, and what that may do to its run folder."""

from dataclasses import dataclass

from yrunner.commands.base_record import base_record, check_base
from yrunner.commands.environment import describe_environment
from yrunner.commands.fingerprint import fingerprint
from yrunner.commands.measure import Measured
from yrunner.commands.resume import check_resume, take_up
from yrunner.commands.train_story import write_run_report
from yrunner.console import say
from yrunner.data.plan import Plan
from yrunner.data.prepared import Prepared
from yrunner.data.report import as_json
from yrunner.recipe.load import recipe_to_yaml
from yrunner.recipe.schema import Recipe
from yrunner.run_dir import RunDir, write_json, write_text


@dataclass(frozen=True)
class Order:
    """How a run was asked for."""

    arguments: str
    """Recipe and overrides as they were typed, for the commands that a person is told of."""
    resume: bool = False
    overwrite: bool = False
    is_base: bool = False
    """Trained only because another recipe starts from it."""
    from_step: int | None = None
    """The update whose checkpoint a resumed run goes on from."""

    @property
    def options(self) -> list[str]:
        """As options of the command."""
        said = {"--resume": self.resume, "--overwrite": self.overwrite, "--is-base": self.is_base}
        return [option for option, is_set in said.items() if is_set]

    @property
    def to_go_on(self) -> str:
        """How an interrupted run is taken up again."""
        if self.is_base:
            return "run the same command again to go on"
        return f"go on with: yrun train {self.arguments} --resume"


def check_run_folder(run_dir: RunDir, recipe: Recipe, order: Order) -> None:
    """Refuse what could lose a run, before any time is spent."""
    run_dir.check(*run_dir.folders() if order.overwrite else [run_dir.checkpoints])
    if order.resume:
        check_resume(run_dir, recipe)
    elif run_dir.is_used() and not order.overwrite:
        run_dir.create()  # raises, with what to do


def say_finished(recipe: Recipe, run_dir: RunDir) -> None:
    """A kill can have come between the model and its report, which is written now."""
    if not run_dir.report.exists():
        measured = [Measured.load(path) for path in (run_dir.before, run_dir.after)]
        write_run_report(recipe, run_dir, *measured)
    say(f"{recipe.name} is finished: {run_dir.model}")


def begin_or_take_up(
    recipe: Recipe, run_dir: RunDir, order: Order, prepared: Prepared, plan: Plan, num_ranks: int
) -> None:
    """Write down what the run is, begun by so many processes; or how a stopped one goes on."""
    if order.from_step is None:
        _open_run_folder(recipe, run_dir, prepared, num_ranks, overwrite=order.overwrite)
        return
    if recipe.model.base is not None:
        check_base(recipe, run_dir)
    take_up(run_dir, recipe, order.from_step, plan.num_updates)


def _open_run_folder(
    recipe: Recipe, run_dir: RunDir, prepared: Prepared, num_ranks: int, *, overwrite: bool
) -> None:
    if overwrite:
        run_dir.clear()
    run_dir.create()
    write_text(run_dir.recipe, recipe_to_yaml(recipe))
    write_json(run_dir.fingerprint, fingerprint(recipe))
    if recipe.model.base is not None:
        write_json(run_dir.base, base_record(recipe))
    write_json(run_dir.environment, {**describe_environment(), "processes": num_ranks})
    write_json(run_dir.data_report, as_json(prepared.reports, prepared.findings))
