"""How training goes: loss, accuracy, learning rate, speed."""

from typing import Any

from twinkle_dask.metrics.base import Facts, Metric, kept
from twinkle_dask.types import Json


class LossMetric(Metric):
    """The mean loss: over tokens where losses are sums, else over passes; and the last norm."""

    def empty(self, now: float) -> Json:
        """See ``Metric``."""
        del now
        return {"loss": 0.0, "passes": 0, "tokens": 0.0, "grad_norm": 0.0}

    def add(self, values: Json, settings: Json, facts: Facts) -> Json:
        """See ``Metric``."""
        del settings
        if facts.loss is None:
            return values
        norm = values["grad_norm"] if facts.grad_norm is None else kept(facts.grad_norm)
        return {
            "loss": kept(float(values["loss"]) + facts.loss),
            "passes": values["passes"] + 1,
            "tokens": values["tokens"] + (facts.num_counted if facts.summed else 0.0),
            "grad_norm": norm,
        }

    def tell(self, values: Json, settings: Json, now: float) -> Json:
        """See ``Metric``."""
        del settings, now
        number = values["tokens"] or values["passes"] or 1
        told: Json = {"loss": f"{float(values['loss']) / number:.4f}"}
        if float(values["grad_norm"]) > 0:
            told["grad_norm"] = f"{float(values['grad_norm']):.6f}"
        return told


class Accuracy(Metric):
    """How often the likeliest token is the label."""

    def empty(self, now: float) -> Json:
        """See ``Metric``."""
        del now
        return {"correct": 0, "total": 0}

    def add(self, values: Json, settings: Json, facts: Facts) -> Json:
        """See ``Metric``."""
        del settings
        if facts.correct is None:
            return values
        masks = [labels != -100 for labels in facts.labels]
        pairs = zip(facts.correct, masks, strict=True)
        return {
            "correct": values["correct"] + sum(int((row & mask).sum()) for row, mask in pairs),
            "total": values["total"] + sum(int(mask.sum()) for mask in masks),
        }

    def tell(self, values: Json, settings: Json, now: float) -> Json:
        """See ``Metric``."""
        del settings, now
        if not values["total"]:
            return {}
        return {
            "accuracy": f"{values['correct'] / values['total']:.2f}",
            "correct_tokens": values["correct"],
            "total_tokens": values["total"],
        }


class TrainMetric(Metric):
    """Learning rates, steps, time since the metric was made, steps a second since the last call."""

    def empty(self, now: float) -> Json:
        """See ``Metric``."""
        return {
            "began": now, "told": now, "gradients": 0, "last": 0, "accumulation": 1, "rates": None,
        }  # fmt: skip

    def add(self, values: Json, settings: Json, facts: Facts) -> Json:
        """See ``Metric``."""
        del settings
        return {
            **values,
            "gradients": facts.gradients,
            "accumulation": facts.accumulation,
            "rates": [kept(rate) for rate in facts.learning_rates],
        }

    def tell(self, values: Json, settings: Json, now: float) -> Json:
        """See ``Metric``."""
        del settings
        told: Json = {}
        rates: list[Any] = values["rates"] or []
        for index, rate in enumerate(rates):
            name = "learning rate" if len(rates) == 1 else f"learning rate(param group {index + 1})"
            told[name] = f"{float(rate):.6e}"
        accumulation, elapsed = values["accumulation"], now - values["began"]
        since = now - values["told"]
        steps = (values["gradients"] - values["last"]) / accumulation
        told["iters"] = values["gradients"] // accumulation
        told["total time elapse"] = (
            f"{elapsed:.0f} seconds" if since < 60 else f"{elapsed / 60:.1f} minutes"
        )
        told["speed"] = f"{steps / since if since > 0 else 0.0:.2f} iters/s"
        return told

    def again(self, values: Json, now: float) -> Json:
        """Time and steps go on."""
        return {**values, "told": now, "last": values["gradients"]}
