"""Statistics of the mels that a vocoder is trained on, for its files: by them it knows a mel of another front end."""

from audio import MelSpectrogram, read_mel
from config import Config
from data import read_clip, read_file_list, read_paired_mels
from harness.errors import InputError
from synthesis.mel_checks import MelStatistics

CLIPS = 32  # the first of the training list
SECONDS = 10  # of each


def training_mel_statistics(config: Config) -> MelStatistics | None:
    """Statistics of the first training clips that are long enough for a mel; None where there are none."""
    data = config.data_config
    front_end, mels = MelSpectrogram(data), []
    given = read_paired_mels([data.training_files])
    for path in read_file_list(data.training_files)[:CLIPS]:
        try:
            if path in given:
                mels.append(read_mel(given[path], data.n_mel_channels))
                continue
            mels.append(front_end(read_clip(path, data)[: SECONDS * data.sampling_rate]))
        except InputError:  # too short, which training itself pads; what is broken stops it by name
            continue
    statistics = MelStatistics.of(mels) if mels else None
    return statistics if statistics is not None and statistics.std > 0 else None
