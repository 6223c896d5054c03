"""Training: a loss, a step of AdamW, and a loop that loses nothing when it is stopped."""

import functools
import signal
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from examples.language_model.attending import within_documents
from examples.language_model.checkpoints import Checkpoints, History
from examples.language_model.model import LanguageModel
from examples.language_model.packing import Batch, Stream
from examples.language_model.placing import OneDevice
from examples.language_model.settings import Plan, Sizes

ONE_DEVICE = OneDevice()


def begin(sizes: Sizes, plan: Plan) -> tuple[LanguageModel, nnx.Optimizer]:
    """Makes a model that has learnt nothing yet, and its optimizer."""
    model = LanguageModel(sizes, rngs=nnx.Rngs(plan.seed))
    return model, nnx.Optimizer(model, rule(plan), wrt=nnx.Param)


@functools.cache  # or else each would be another program to compile
def rule(plan: Plan) -> optax.GradientTransformation:
    """Makes AdamW, with a rate that rises for a tenth of the steps and then falls."""
    rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=plan.rate,
        warmup_steps=max(plan.steps // 10, 1),
        decay_steps=max(plan.steps, 2),
        end_value=plan.rate / 20,
    )
    is_matrix = lambda parameters: jax.tree.map(lambda x: x.ndim > 1, parameters)
    adamw = optax.adamw(rate, b2=0.95, weight_decay=0.1, mask=is_matrix)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def mean_loss(model: LanguageModel, batch: Batch, attending=within_documents) -> jax.Array:
    """Computes how many nats the model needs for a token, on average.

    Args:
        model: Predicts.
        batch: Its tokens, and what comes next.
        attending: How to attend: a function of `batch.document`.
    """
    logits = model(batch.tokens, batch.position, attending(batch.document))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets))


@functools.cache
def make_step(attending) -> Callable[..., jax.Array]:
    """Makes a compiled step, which changes model and optimizer and gives the loss before.

    Args:
        attending: How to attend: a function of `batch.document`.
    """

    @nnx.jit
    def step(model, optimizer, batch):
        loss = lambda model: mean_loss(model, batch, attending)
        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    return step


def make_judge(
    validation: Batch, place: OneDevice = ONE_DEVICE
) -> Callable[[LanguageModel], float]:
    """Makes a function that gives the mean loss over these rows."""
    row_loss = nnx.jit(lambda model, row: mean_loss(model, row, place.attending))
    rows = [
        place.batch(Batch(*(array[i : i + 1] for array in validation)))
        for i in range(len(validation.tokens))
    ]
    return lambda model: float(np.mean([row_loss(model, row) for row in rows]))


def train(
    model: LanguageModel,
    optimizer: nnx.Optimizer,
    stream: Stream,
    judge: Callable[[LanguageModel], float],
    history: History,
    checkpoints: Checkpoints,
    save_every: float,
    judge_every: int = 50,
    place: OneDevice = ONE_DEVICE,
) -> None:
    """Trains from where `history` ends, with a checkpoint at least every so many seconds.

    Ctrl-C and `kill` end it after the step at hand, and save.
    """
    step = make_step(place.attending)
    place.weights(model, optimizer)
    saved = time.monotonic()
    with Stopping() as stopping, _bar(history) as bar:
        while history.done < history.steps and not stopping.asked:
            loss = float(step(model, optimizer, place.batch(stream[history.done])))
            history.add(loss)
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()
            is_last = history.done == history.steps
            if history.done % judge_every == 0 or is_last:
                history.judge(judge(model))
                bar.write(history.line())
            if is_last or stopping.asked or time.monotonic() - saved > save_every:
                checkpoints.save(model, optimizer, history)
                saved = time.monotonic()


class Stopping:
    """Turns the first Ctrl-C into a flag, so that no step is left half done."""

    def __enter__(self):
        self.asked = False
        self._before = {
            number: signal.signal(number, self._ask)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        self.asked = True
        signal.signal(number, self._before[number])  # the second one is as usual


def _bar(history: History) -> tqdm:
    return tqdm(total=history.steps, initial=history.done, unit="step", disable=None)
