"""A vocoder's training run: what it logs, shows and measures besides the steps of harness/loop.py."""

import functools
import math
from collections.abc import Sequence

import torch

from audio import INT16_SCALE, write_wav
from config import REMEDIES
from data import ClipDataset, load_synthesis_entry, read_test_lists
from evaluation.flow_statistics import NoiseStatistics, flow_statistics
from evaluation.likelihood import ClipLikelihood, clip_likelihoods, summarise_lists
from evaluation.pictures import mel_figure
from fast.engine import engine_of
from harness import terminal
from harness.devices import memory_in_use
from harness.folder import record_more
from harness.log import NoLog, RunLog
from harness.loop import Loop, Step
from harness.processes import gather, is_main
from harness.stopping import StopRequest, safe_point
from training.expected import NEGATIVE_IS_RIGHT, Standing, expected_curve
from training.trainer import Trainer

MOST_CREDIBLE = math.log(INT16_SCALE)  # nats/sample: the whole density within one step of 16-bit audio
COLUMNS = ("iteration", "loss", "prior", "log_det", "grad_norm", "learning_rate")  # of losses.csv
LIKELIHOOD_COLUMNS = ("iteration", "list", "clips", "log_likelihood", "weighted", "prior", "log_det")
LIKELIHOOD_FILE = "test_likelihood.csv"
SAMPLE_SECONDS = 5.0  # of the first test clip, at most, in the sample at each checkpoint
STATISTICS_CLIPS = 8  # test clips that the statistics of flows and z are of
CHARTS = {
    "training": {"loss and what was expected": ("train/loss", "expected/loss")},
    "flows": {"log-determinant of each, nats/sample": ("log_det/.*",), "std of log_s of each": ("log_s_std/.*",)},
}


def train_until(last: int, trainer: Trainer, test_clips: ClipDataset, stop: StopRequest) -> bool:
    """Train to iteration `last` or to a stop, with a checkpoint, an evaluation and a sample every
    `iters_per_checkpoint`. Returns whether the last checkpoint could be saved.

    test_clips: this process's share of the test clips.
    """
    return VocoderLoop(last, trainer, test_clips, stop).run()


class VocoderLoop(Loop):
    """The loop with the likelihood of the test clips and a sample at each checkpoint."""

    remedies = REMEDIES

    def __init__(self, last: int, trainer: Trainer, test_clips: ClipDataset, stop: StopRequest) -> None:
        train = trainer.config.train_config
        log = RunLog(trainer.folder, trainer.iteration, COLUMNS, train.with_tensorboard) if is_main() else NoLog()
        super().__init__(trainer, last, train.iters_per_checkpoint, log, stop)
        place = trainer.folder, trainer.iteration, LIKELIHOOD_COLUMNS
        self.likelihoods = RunLog(*place, file=LIKELIHOOD_FILE) if is_main() else NoLog()
        self.test_clips, self.test_lists = test_clips, read_test_lists(trainer.config.data_config)
        self.expected = expected_curve(trainer.config, trainer.loader.dataset.lengths)
        self.losses: dict[int, float] = {}  # by iteration, of this start
        self.recorded = False  # whether the kernels of the samples are
        self.credible = True  # whether no likelihood so far was beyond that
        self.samples_per_step = train.batch_size * (trainer.config.data_config.segment_length - train.crop_context)

    def begin(self) -> None:
        """Meaning of losses, and those to be expected; likelihood and flows of fresh weights."""
        self.log.charts(CHARTS)
        if self.trained.iteration == 0:
            if is_main():
                terminal.tell(NEGATIVE_IS_RIGHT if self.expected is None else f"{NEGATIVE_IS_RIGHT}; {self.expected}")
            self._report_likelihood()
            self._report_flows()

    def close(self) -> None:
        """Close the tables."""
        super().close()
        self.likelihoods.close()

    def row(self, step: Step) -> Sequence[float]:
        """A row of COLUMNS."""
        return step.iteration, *step.results, step.learning_rate

    def taken(self, steps: Sequence[Step], seconds: float) -> None:
        """The speed of training and the expected loss to TensorBoard."""
        speed = len(steps) * self.samples_per_step / seconds
        self.log.scalar("train/samples_per_second", speed, steps[-1].iteration)
        best = -min(step.results[0] for step in steps)
        if self.credible and best > MOST_CREDIBLE:
            self.credible = False
            terminal.warn(
                f"iteration {steps[-1].iteration}: {best:.1f} nats/sample are beyond what 16-bit audio can have "
                f"({MOST_CREDIBLE:.1f}), as for silence; look at the files with --check_data"
            )
        self.losses.update((step.iteration, step.results[0]) for step in steps)
        for point in self._expected_points(steps):
            self.log.scalars({"expected/loss": point.expected, "expected/of_this_run": point.loss}, point.iteration)

    def short(self, step: Step, steps_per_second: float) -> str:
        """Loss, learning rate and speed."""
        return f"loss {step.results[0]:.4f}, lr {step.learning_rate:.2g}, {self._speed(steps_per_second)}"

    def line(self, steps: Sequence[Step], steps_per_second: float) -> str:
        """Averages of the loss, its terms and the gradient norm; learning rate and speed."""
        columns = zip(*(step.results for step in steps), strict=True)
        loss, prior, log_det, norm = (sum(values) / len(steps) for values in columns)
        return (
            f"iteration {steps[-1].iteration}: loss {loss:.4f} (prior {prior:.4f}, log-determinant {log_det:.4f}), "
            f"gradient norm {norm:.3g}, lr {steps[-1].learning_rate:.3g}, {self._speed(steps_per_second)}"
        )

    def _speed(self, steps_per_second: float) -> str:
        return f"{steps_per_second * self.samples_per_step / 1000:.1f}k samples/s"

    def milestone(self, finished: bool) -> None:
        """Checkpoint, likelihood, statistics of the flows, sample."""
        self.saver.save()
        if is_main() and self.expected is not None and (standing := self.expected.standing(self.losses)):
            terminal.tell(str(standing))
        self._report_likelihood()
        self._report_flows()
        if is_main():
            self.stop.unless_stopped(self._write_sample)

    def _expected_points(self, steps: Sequence[Step]) -> list[Standing]:
        """Points of the expected curve that these steps came to, beside this run."""
        if self.expected is None:
            return []
        reached = [step.iteration for step in steps if step.iteration in self.expected.points]
        return [point for step in reached if (point := self.expected.standing(self.losses, step))]

    def _report_likelihood(self) -> None:
        """The likelihood of the test clips, over all processes; nothing after a signal."""
        trainer, config = self.trained, self.trained.config

        def evaluate_share() -> list[ClipLikelihood]:
            with trainer.precision.full():
                return clip_likelihoods(trainer.evaluated, self.test_clips, config.train_config.sigma, trainer.device)

        clips = gather(self.stop.unless_stopped(evaluate_share))
        if clips is None:
            return
        seconds = config.data_config.segment_length / config.data_config.sampling_rate
        for name, result in summarise_lists(clips, self.test_lists).items():
            place = "test" if len(self.test_lists) == 1 else f"test/{name}"
            terms = ("mean", "weighted", "prior", "log_det")
            values = {f"{place}/log_likelihood_{term}": getattr(result, term) for term in terms}
            self.log.scalars(values, trainer.iteration)
            self.likelihoods.steps([(trainer.iteration, name, *result)])
            of = "" if len(self.test_lists) == 1 else f" of {name}"
            terminal.say(f"iteration {trainer.iteration}, first {seconds:.2f} s of each test clip{of}: {result}")

    def _report_flows(self) -> None:
        """What each flow does, what z and the memory are like, to TensorBoard; of the main process's first clips."""
        if not self.log.shows:
            return
        trainer, sigma = self.trained, self.trained.config.train_config.sigma
        memory = {f"memory_mib/{name}": size / 2**20 for name, size in memory_in_use(trainer.device).items()}
        self.log.scalars(memory, trainer.iteration)
        clips = (self.test_clips[index][1:] for index in range(min(STATISTICS_CLIPS, len(self.test_clips))))
        with trainer.precision.full():
            found = self.stop.unless_stopped(lambda: flow_statistics(trainer.evaluated, clips, trainer.device))
        if found is None:
            return
        flows, z = found
        for flow in flows:
            name = flow.name.replace(" ", "_")
            self.log.scalar(f"log_det/{name}", flow.log_det, trainer.iteration)
            if flow.std is not None:
                self.log.scalar(f"log_s_std/{name}", flow.std, trainer.iteration)
        moments = NoiseStatistics.of(z, sigma)._asdict()
        self.log.scalars({f"z/{name}": value for name, value in moments.items()}, trainer.iteration)
        self.log.histogram("z", z, trainer.iteration)

    def _write_sample(self) -> None:
        """Copy-synthesis of the first seconds of the first test clip, so that progress can be heard."""
        try:
            self._synthesize_first()
        except OSError as error:
            terminal.say(f"warning: the sample was not written ({error.strerror or error})")

    def _synthesize_first(self) -> None:
        trainer, data = self.trained, self.trained.config.data_config
        safe_point()
        longest = round(SAMPLE_SECONDS * data.sampling_rate)
        mel, recording = load_synthesis_entry(self.test_clips.files[0], data, self.test_clips.mel, longest)
        devices = [trainer.device] if trainer.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # none of the run's own random numbers
            torch.manual_seed(trainer.config.train_config.seed)
            with trainer.precision.full():
                audio = trainer.evaluated.reverse_fast(mel.unsqueeze(0).to(trainer.device))[0].cpu()
        if not torch.isfinite(audio).all():
            terminal.say("the sample is not finite and was not written; the model may need more training")
            return
        if not self.recorded:
            self.recorded = True
            choices = engine_of(trainer.evaluated).choices
            record_more(trainer.folder, iteration=trainer.iteration, synthesis=choices)
        write_wav(trainer.folder / "samples" / f"waveflow_{trainer.iteration}.wav", audio, data.sampling_rate)
        mels = {"recording": mel, "synthesis": self.test_clips.mel(audio.clamp(-1, 1))}
        for name, sound in {"recording": recording, "synthesis": audio}.items():
            self.log.audio(f"audio/{name}", sound, data.sampling_rate, trainer.iteration)
        for name, picture in mels.items():
            draw = functools.partial(mel_figure, {name: picture})
            self.log.figure(f"mel/{name}", draw, trainer.iteration)
