"""`Trainer`: a training loop of one call, which goes on bit for bit where it was killed."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from cruxy_control.checks import check_count
from cruxy_torch._controlled_optimizer import ControlledOptimizer
from cruxy_torch._distributed.shards import launched_ranks
from cruxy_torch.training import checkpoint, random_states, results
from cruxy_torch.training.batches import Batches, moved
from cruxy_torch.training.evaluation import averages, evaluating, mean_loss
from cruxy_torch.training.horizon import tell_the_end
from cruxy_torch.training.losses import Loss
from cruxy_torch.training.parts import optimizer_of, placed, releasing
from cruxy_torch.training.progress import bar_of

_log = logging.getLogger(__name__)


class Trainer:
    """Trains a model on a loader, evaluates it, saves it, and goes on exactly where it was killed.

    For one process and any model, loss and optimizer. `CruxyTrainer` is for Hugging Face's own
    `Trainer`, with data sets, several processes and its callbacks.

    **Resuming is exact.** A checkpoint holds weights, the optimizer with its controller, averages
    and codes, the scheduler, the losses so far, where the loader is, and the states of all random
    generators: those of torch, CUDA, NumPy and Python, and those that the loader and its samplers
    have of their own. A run that was killed ends with the bits of one that was not, where the
    operations of its device do. One thing cannot be brought back: what workers that are kept
    (`persistent_workers=True`) draw at random. A loader with a state of its own
    (`StatefulDataLoader`) is asked for it. Weights in few bits are not saved: `load_model` gives
    them again.

    **Averages.** Where the optimizer keeps an average of the parameters, as under self-driving,
    that is what `evaluate` evaluates and `save_model` saves.

    Args:
        model: the model. `load_model` gives one that is larger than the memory would allow.
        train_loader: gives batches, anew for every epoch.
        val_loader: likewise, for `evaluate`; `None` for none.
        optimizer: an optimizer of the model's parameters, or a function that makes one of the list
            of those that are trained; `None` for `AXIOM(lr=lr, weight_decay=weight_decay)`.
        loss_fn: a function of model and batch that gives a scalar; or a loss of torch, such as
            `torch.nn.CrossEntropyLoss()`, for batches of inputs and targets. `None` is for models
            that give `.loss` themselves, as those of transformers do: a batch is then a mapping, a
            tensor of tokens, or tokens and labels; labels that are absent are the tokens without
            the padding.
        scheduler: a scheduler of torch, which is stepped after every step; `None` for none.
        lr: rate of the default optimizer.
        weight_decay: its weight decay.
        release: frees each gradient as soon as its parameter is updated, see
            `CruxyOptimizer.register_hooks`. `None` does so for the default optimizer and leaves any
            other as it is.
        pass_horizon: tells a self-driving optimizer that knows no end that `fit` ends at `steps`.
        eval_interval: steps between two evaluations, at least 1.
        log_interval: steps between two lines of the log, at least 1.
        checkpoint_interval: steps between two checkpoints; 0 for none.
        checkpoint_dir: a folder, made where it is absent. Checkpoints in it are named
            `<results_prefix>-<step>.pt`, and none is ever deleted.
        save_results: writes `<results_prefix>.json` and `<results_prefix>.png` at the end of `fit`.
        results_prefix: the beginning of these names; a path for the results.
        device: where to train; `None` for where the model is.
        precision: `"bf16"` computes under autocast to bfloat16; `"fp32"` and `None` as the
            parameters are.
        max_val_batches: the most batches of `val_loader` that an evaluation within `fit` takes;
            `None` for all.
        progress: shows a progress bar where tqdm is installed.

    Raises:
        ValueError: where an argument is outside its range, gradients cannot be released, or there
            are several processes, as under torchrun.
        TypeError: where `optimizer` gives none.

    Examples:
        >>> import tempfile, torch
        >>> from cruxy_torch import CruxyOptimizer, Trainer
        >>> _ = torch.manual_seed(0)
        >>> x = torch.linspace(-1, 1, 64)[:, None]
        >>> data = torch.utils.data.TensorDataset(x, 3 * x)
        >>> loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
        >>> model = torch.nn.Linear(1, 1)
        >>> with tempfile.TemporaryDirectory() as folder, Trainer(
        ...     model, loader, loader, loss_fn=torch.nn.MSELoss(), progress=False,
        ...     optimizer=lambda params: CruxyOptimizer(params, mode="self_driving"),
        ...     checkpoint_dir=folder, results_prefix=f"{folder}/line",
        ... ) as trainer:
        ...     results = trainer.fit(steps=300, resume="latest")
        >>> results["steps"], results["final_train_loss"] < 0.01 * results["initial_train_loss"]
        (300, True)
    """

    def __init__(
        self,
        model: nn.Module,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None = None,
        optimizer: Optimizer | Callable[[list[nn.Parameter]], Optimizer] | None = None,
        loss_fn: Callable[..., Any] | None = None,
        *,
        scheduler: Any = None,
        lr: float = 5e-4,
        weight_decay: float = 0.01,
        release: bool | None = None,
        pass_horizon: bool = True,
        eval_interval: int = 200,
        log_interval: int = 100,
        checkpoint_interval: int = 500,
        checkpoint_dir: str | Path = "checkpoints",
        save_results: bool = True,
        results_prefix: str | Path = "run",
        device: str | torch.device | None = None,
        precision: Literal["bf16", "fp32"] | None = None,
        max_val_batches: int | None = None,
        progress: bool = True,
    ) -> None:
        check_count("eval_interval", eval_interval, 1, remedy="200 is the default")
        check_count("log_interval", log_interval, 1, remedy="100 is the default")
        check_count("checkpoint_interval", checkpoint_interval, 0, remedy="0 is for none")
        if precision not in (None, "bf16", "fp32"):
            raise ValueError(f"precision must be 'bf16', 'fp32' or None, got {precision!r}.")
        if (ranks := launched_ranks()) > 1:
            raise ValueError(
                f"Trainer must be alone, got {ranks} processes, which would each train a model of "
                "their own and write the same files; use CruxyTrainer of "
                "cruxy_torch.integrations.huggingface, or a loop of your own."
            )
        self.model = placed(model, device)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.train_loader, self.val_loader = train_loader, val_loader
        self.optimizer = optimizer_of(optimizer, model, lr, weight_decay)
        self.scheduler = scheduler
        self._loss = Loss(loss_fn, model)
        self._pass_horizon, self._save_results = pass_horizon, save_results
        self._every = {
            "eval": eval_interval,
            "log": log_interval,
            "checkpoint": checkpoint_interval,
        }
        self._folder, self._prefix = Path(checkpoint_dir), Path(results_prefix)
        self._autocast, self._progress = precision == "bf16", progress
        self._max_val_batches = max_val_batches
        if release or (release is None and optimizer is None):
            releasing(self.optimizer).register_hooks()
        self._batches = Batches(train_loader)
        self._waiting: list[Tensor] = []
        self._history: dict[str, Any] = {
            "train_losses": [], "val_steps": [], "val_losses": [], "seconds": 0.0, "tokens": 0,
        }  # fmt: skip
        self.step = 0

    def fit(self, steps: int, resume: str | Path | None = None) -> dict[str, Any]:
        """Trains until so many steps are taken, those of a checkpoint included.

        Args:
            steps: the step at which to end, at least 1. A second call goes on.
            resume: a checkpoint to go on from; `"latest"` for that with the highest step in
                `checkpoint_dir`, or a new run where there is none; `None` for neither.

        Returns:
            What the run came to; the same is in the JSON file.

            - `train_losses`, `initial_train_loss`, `final_train_loss`, `train_improvement_pct`;
            - `val_losses`, `val_ppls`, `initial_val_ppl`, `final_val_ppl`, `val_improvement_pct`
              (of the perplexity; of the loss where there is none), and `val_steps`: before the
              first step, at every `eval_interval` and at the end. `val_ppls` is `None`, as both
              perplexities, where the loss is no mean over tokens;
            - `peak_vram_gb` (`None` without CUDA), `peak_rss_gb`, `tokens_per_sec` (padding
              included, evaluation excluded; `None` without tokens), `total_time_min`;
            - `compression_total`: 12 bytes for each trained parameter, which Adam's gradient and
              state take, over the bytes of gradients alive at once and state that were held;
            - `steps`, `skipped_total`, `telemetry`, `memory` and `environment`.

        Raises:
            ValueError: where there is no batch, the loss is no scalar, `steps` is below those that
                were taken, or a checkpoint does not fit.
            FileNotFoundError: where there is no such checkpoint.
        """
        check_count("steps", steps, 1, remedy="give the steps of the whole run")
        self._tell_the_end(steps)
        self._resume(resume)
        if steps < self.step:
            raise ValueError(
                f"steps must be at least the {self.step} that were taken, got {steps}; it counts "
                "those before the checkpoint too."
            )
        self._tell_the_end(steps)
        self.model.train()
        begun = self.step
        with bar_of(steps, self.step, shown=self._progress) as bar:
            if self.val_loader is not None and not self._history["val_steps"]:
                self._evaluated()
            while self.step < steps:
                loss = self._step()
                bar.update(1)
                self._at(self.step, steps, bar, loss)
        if (
            self.step > begun
            and self._every["checkpoint"]
            and self.step % self._every["checkpoint"]
        ):
            self.save_checkpoint()
        found = self.results()
        if self._save_results:
            results.save(found, self._prefix)
        return found

    def evaluate(self, max_batches: int | None = None) -> tuple[float, float | None]:
        """Loss and perplexity on `val_loader`, by the average where the optimizer keeps one.

        The run is left as it is: random states, modes of the modules, parameters.

        Args:
            max_batches: the most batches to take; `None` for all.

        Returns:
            The mean over all tokens that count, or over examples where the loss is no mean over
            tokens; and its exponential, `None` in the second case.

        Raises:
            ValueError: where there is no `val_loader`, or it has no batch or nothing that counts.
        """
        if self.val_loader is None:
            raise ValueError("evaluate() needs a val_loader, got None; give one to Trainer.")
        generators = random_states.generators_of(self.val_loader)
        generators += random_states.generators_of(self.train_loader)
        with (
            random_states.unmoved(generators),
            averages(self.optimizer),
            evaluating(self.model),
            self._precision(),
        ):
            loss = mean_loss(self.model, self.val_loader, self._loss, self.device, max_batches)
        return loss, results.perplexity(loss) if self._loss.counts_tokens else None

    def save_checkpoint(self, step: int | None = None, path: str | Path | None = None) -> Path:
        """Writes all that `fit` needs to go on from here.

        Args:
            step: kept for code that gives it: it must be the one that was taken last.
            path: the file; by default one in `checkpoint_dir`, named by prefix and step.

        Returns:
            The file.

        Raises:
            ValueError: where `step` is another.
        """
        if step not in (None, self.step):
            raise ValueError(f"step must be {self.step}, which was taken last, got {step}.")
        self._flush()
        saved = {
            "format": checkpoint.FORMAT,
            "step": self.step,
            "model": checkpoint.weights(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "history": self._history,
            "batches": self._batches.state_dict(),
            "random": random_states.taken(random_states.generators_of(self.train_loader)),
        }
        named = checkpoint.path_of(self._folder, self._prefix.name, self.step)
        path = named if path is None else Path(path)
        checkpoint.write(path, lambda file: torch.save(saved, file))
        return path

    def load_checkpoint(self, path: str | Path) -> None:
        """Goes to where a checkpoint was made.

        Raises:
            FileNotFoundError: where there is none.
            ValueError: where it is of another kind, or names or shapes differ from the model's.
        """
        saved = checkpoint.read(Path(path))
        checkpoint.load_weights(self.model, saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scheduler is not None and saved["scheduler"] is not None:
            self.scheduler.load_state_dict(saved["scheduler"])
        self.optimizer.zero_grad()
        self.step, self._history, self._waiting = saved["step"], saved["history"], []
        self._batches.load_state_dict(saved["batches"])
        random_states.restore(saved["random"], random_states.generators_of(self.train_loader))

    def save_model(self, path: str | Path) -> None:
        """Saves the weights, by the average where the optimizer keeps one, for use elsewhere.

        Args:
            path: a folder for a model with `save_pretrained`; for any other a file, which
                `torch.load` reads as a `state_dict`.
        """
        with averages(self.optimizer):
            save: Any = getattr(self.model, "save_pretrained", None)
            if save is not None:
                save(path)
            else:
                state = self.model.state_dict()
                checkpoint.write(Path(path), lambda file: torch.save(state, file))

    def results(self) -> dict[str, Any]:
        """What the run has come to so far, see `fit`."""
        self._flush()
        own = self.optimizer
        telemetry = dict(own.telemetry()) if isinstance(own, ControlledOptimizer) else {}
        held = results.held_bytes(self.model, own)
        return results.collect(
            self._history, self.step, held, telemetry, self._loss.counts_tokens, self.device
        )

    def cleanup(self) -> None:
        """Takes away the hooks that release gradients; the model is then as any other."""
        if isinstance(self.optimizer, ControlledOptimizer):
            self.optimizer.remove_hooks()

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *error: Any) -> None:
        self.cleanup()

    def _step(self) -> Tensor:
        """One step; returns the loss, which is not waited for."""
        begun = time.perf_counter()
        batch = moved(self._batches.take(), self.device)
        with self._precision():
            loss = self._loss(self.model, batch)
        loss.backward()
        seen = loss.detach()
        if isinstance(self.optimizer, ControlledOptimizer):
            self.optimizer.step(loss=seen)
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        self.step += 1
        self._waiting.append(seen)
        self._history["tokens"] += self._loss.tokens(batch) or 0
        self._history["seconds"] += time.perf_counter() - begun
        return seen

    def _at(self, step: int, steps: int, bar: Any, loss: Tensor) -> None:
        """Does what is due after a step."""
        if step % self._every["log"] == 0 or step == steps:
            self._flush()
            bar.set_postfix(loss=f"{float(loss):.4f}")
            _log.info("step %d of %d: loss %.4f", step, steps, float(loss))
        if self.val_loader is not None and (step % self._every["eval"] == 0 or step == steps):
            self._evaluated()
        if self._every["checkpoint"] and step % self._every["checkpoint"] == 0:
            self.save_checkpoint()

    def _evaluated(self) -> None:
        if self.step not in self._history["val_steps"]:
            loss, _ = self.evaluate(self._max_val_batches)
            self._history["val_steps"].append(self.step)
            self._history["val_losses"].append(loss)
            _log.info("step %d: validation loss %.4f", self.step, loss)

    def _flush(self) -> None:
        """Reads the losses that are still on the device."""
        if self._waiting:
            self._history["train_losses"] += torch.stack(self._waiting).double().tolist()
            self._waiting = []

    def _resume(self, resume: str | Path | None) -> None:
        path = Path(resume) if resume not in (None, "latest") else None
        if resume == "latest":
            path = checkpoint.latest(self._folder, self._prefix.name)
        if path is not None:
            self.load_checkpoint(path)
            _log.info("resumed from %s at step %d", path, self.step)

    def _tell_the_end(self, steps: int) -> None:
        if self._pass_horizon:
            tell_the_end(self.optimizer, steps, self.step)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast)
