"""`EfficientCLI`: a LightningCLI that finds recipes, guards the optimizers, and explains errors in one sentence."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined]
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

# Imported for their names: `class_path: LlamaLM` needs no module path, and errors can suggest them.
import lightning_efficient.callbacks
import lightning_efficient.data
import lightning_efficient.models
import lightning_efficient.optimizers
import lightning_efficient.precision
import lightning_efficient.strategies  # noqa: F401
from lightning_efficient._compat import forget_init_args_of_another_class
from lightning_efficient.callbacks import AttachOptimizer, OptimizerGuard
from lightning_efficient.cli.errors import EXIT_BAD_INPUT, UserError, debugging, did_you_mean, report
from lightning_efficient.cli.explain import explain, explain_construction
from lightning_efficient.cli.processes import end_with_launcher, reap_children
from lightning_efficient.cli.quiet import quiet_known_noise
from lightning_efficient.cli.recipes import find_recipe

_CHECKPOINT_WORDS = ("best", "last", "hpc", "registry")


class RecipeAction(ActionConfigFile):
    """`-c RECIPE`: a file of the working folder, the name of a shipped recipe, a URL, or YAML text itself."""

    @override
    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        is_text_or_url = "://" in values or (":" in values.rstrip(":") and not Path(values).suffix)
        if not is_text_or_url:
            try:
                values = str(find_recipe(values))
            except UserError as error:
                raise argparse.ArgumentError(None, str(error)) from error
        if isinstance(parser, EfficientParser):
            parser.reading = values
        super().__call__(parser, cfg, values, option_string)  # type: ignore[no-untyped-call]


class EfficientParser(LightningArgumentParser):
    """A parser whose errors are one sentence with the nearest valid name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.command_parsers: list[EfficientParser] = []
        self.reading = ""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # jsonargparse builds nested parsers of this class and expects an exception from them.
        if not self.exit_on_error or debugging():
            super().error(message, ex)
        parser = self.command_parsers[0] if self.command_parsers else self
        recipe = next((each.reading for each in [self, *self.command_parsers] if each.reading), "the recipe")
        report(explain(message.replace('"<unicode string>"', recipe), parser.option_names()))
        self.exit(EXIT_BAD_INPUT)

    def option_names(self) -> list[str]:
        """Return every dotted option, e.g. `trainer.max_steps`."""
        return [str(key) for key in self.get_defaults(skip_validation=True).keys()]  # noqa: SIM118 (a Namespace)


class SaveRecipe(SaveConfigCallback):
    """Saves the run's full configuration beside its logs; never overwrites a file, never fails on a second run."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        log_dir = trainer.log_dir  # broadcasts, so every rank must ask
        if log_dir is None:
            return
        self.config_filename = free_name(Path(log_dir), self.config_filename)
        super().setup(trainer, pl_module, stage)


def free_name(folder: Path, name: str) -> str:
    """Return `name`, or `name` with the first free number, such that the folder holds no such file."""
    stem, suffix = Path(name).stem, Path(name).suffix
    number = 0
    while (folder / name).exists():
        number += 1
        name = f"{stem}_{number}{suffix}"
    return name


class EfficientCLI(LightningCLI):
    """LightningCLI as the recipes need it.

    - `-c RECIPE` is looked up in the working folder, then among the shipped recipes; several overlay each other.
    - Models build their optimizers in `configure_optimizers`, from an `OptimizerCallable`: LightningCLI's own
      `--optimizer` builds them before callbacks can add modules, which then never train. It is switched off.
    - `OptimizerGuard` runs in every `fit`, unless `--optimizer_guard false`.
    - `AttachOptimizer` gives optimizers that watch layers, such as `Eva`, the module.
    - Wrong input ends with one sentence and exit code 2.

    Args:
        args: The words of the command line, starting with the subcommand; `sys.argv[1:]` when None.
        **kwargs: Passed to `LightningCLI`.
    """

    def __init__(self, args: ArgsType = None, **kwargs: Any) -> None:
        quiet_known_noise()
        forget_init_args_of_another_class()
        end_with_launcher()
        super().__init__(
            args=args,
            auto_configure_optimizers=False,
            seed_everything_default=kwargs.pop("seed_everything_default", 0),
            save_config_callback=kwargs.pop("save_config_callback", SaveRecipe),
            parser_class=kwargs.pop("parser_class", EfficientParser),
            parser_kwargs={"prog": "lightning-efficient", **kwargs.pop("parser_kwargs", {})},
            **kwargs,
        )

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", [f"lightning.pytorch=={pl.__version__}"])
        parser = self.parser_class(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=RecipeAction,
            metavar="RECIPE",
            help="A YAML file, or the name of a shipped recipe. May be given several times: later ones overlay.",
        )
        return parser

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--optimizer_guard",
            type=bool,
            default=True,
            help="Stop at fit start unless each trainable parameter is in exactly one optimizer group.",
        )
        if isinstance(self.parser, EfficientParser) and isinstance(parser, EfficientParser):
            self.parser.command_parsers.append(parser)
            parser.command_parsers.append(parser)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # LightningCLI warns when both `args` and sys.argv are there; ours are always the same words.
        if args is None or isinstance(args, list):
            self.config = parser.parse_args(args)
        else:
            self.config = parser.parse_object(args)
        _check_values(self.config[self.config["subcommand"]] if "subcommand" in self.config else self.config)

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            if debugging():
                raise
            raise UserError(explain_construction(str(error))) from error

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        if self.subcommand == "fit":
            guard = self.config[self.subcommand].get("optimizer_guard")
            callbacks = self.config_init[self.subcommand]["trainer"]["callbacks"]
            own: list[Callback] = [AttachOptimizer(required=False), *([OptimizerGuard()] if guard else [])]
            kwargs["callbacks"] = with_defaults(callbacks, own)
        trainer = super().instantiate_trainer(**kwargs)
        reap_children(trainer)
        return trainer


def with_defaults(callbacks: list[Callback] | Callback | None, defaults: Iterable[Callback]) -> list[Callback]:
    """Return the callbacks of a recipe, and each of the defaults of whose class it has none."""
    present = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks] if callbacks else []
    missing = [each for each in defaults if not any(isinstance(other, type(each)) for other in present)]
    return [*present, *missing]


def _check_values(config: Namespace) -> None:
    """Check what jsonargparse takes for any string, before the seed is set or a model is built."""
    strategy, accelerator = config.get("trainer.strategy"), config.get("trainer.accelerator")
    _check_registered("trainer.strategy", strategy, StrategyRegistry.available_strategies())
    _check_registered("trainer.accelerator", accelerator, AcceleratorRegistry.available_accelerators())
    _check_checkpoint(config.get("ckpt_path"))


def _check_registered(key: str, value: object, names: Iterable[str]) -> None:
    known = [*names, "auto", "gpu"] if key.endswith("accelerator") else [*names, "auto"]
    if isinstance(value, str) and value.lower() not in known:
        common = ", ".join(sorted(name for name in known if "unused" not in name))
        raise UserError(f"{key}: there is no '{value}'.{did_you_mean(value, known) or f' Known: {common}.'}")


def _check_checkpoint(path: object) -> None:
    if not isinstance(path, str) or path in _CHECKPOINT_WORDS or path.startswith("registry:") or "://" in path:
        return
    if not Path(path).exists():
        folder = Path(path).parent
        names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        raise UserError(f"ckpt_path: there is no file '{path}'.{did_you_mean(Path(path).name, names)}")
