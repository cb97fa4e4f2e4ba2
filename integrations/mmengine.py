"""Training a model with IFRHeads under mmengine: the warm-up, and what the solvers reach."""

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from .training import TrainingHook


@HOOKS.register_module()
class IFRHook(TrainingHook, Hook):
    """Warm-up, logging and warnings in mmengine's Runner. Arguments and errors: see TrainingHook."""

    def before_train(self, runner: Runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self.start(model, runner.iter, "mask_head=dict(type='IFRFCNMaskHead')")

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        if is_main_process():
            self.listen(runner.iter)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: object = None
    ) -> None:
        scalars, warnings = self.finish()
        for name, value in scalars.items():
            runner.message_hub.update_scalar(f"train/{name}", value)
        for warning in warnings:
            runner.logger.warning(warning)
