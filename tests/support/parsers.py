"""The parsers of all six command lines, by the program's name: words -> what they mean."""

import benchmark.__main__ as benchmark
import data
import experiments.__main__ as experiments
import image_density_experiments.options as image_options
import jobs.files
import train

PARSERS = {
    "train.py": train.parse_arguments,
    "data.py": lambda words: data._parser().parse_args(words),
    "checkpoint.py": lambda words: jobs.files.parser().parse_args(words),
    "benchmark": benchmark.parse_arguments,
    "experiments": experiments.parse_arguments,
    "image_density_experiments/train.py": image_options.parse_arguments,
}
