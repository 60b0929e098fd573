"""The command line of every stage: its docstring as it stands, flags in groups with their defaults, and the
types of their values. A value outside its range is refused by name while the command line is read."""

import argparse
import json
import math
import os
import re

LARGEST = 2**31 - 1  # what torch and vLLM take for a count


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help that keeps the docstring's lines and names defaults, where there are any."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def stage_parser(docstring):
    return Parser(description=docstring, formatter_class=HelpFormatter, allow_abbrev=False)


def number(kind, allowed, words):
    """An argparse type. kind: int or float; allowed(value): whether it is in the range that `words` names."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (allowed(value) and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be {words}, not {text!r}")
        return value

    return read


positive_int = number(int, lambda n: 1 <= n <= LARGEST, f"an integer from 1 to {LARGEST}")
non_negative_int = number(int, lambda n: 0 <= n <= LARGEST, f"an integer from 0 to {LARGEST}")
positive = number(float, lambda x: 0 < x <= 1e37, "a number above 0 and of at most 1e37")  # float32
non_negative = number(float, lambda x: 0 <= x <= 1e37, "a number from 0 to 1e37")
fraction = number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
positive_fraction = number(float, lambda x: 0 < x <= 1, "a number above 0 and of at most 1")
# vLLM would raise a smaller one to 0.01
temperature = number(float, lambda x: x == 0 or x >= 0.01, "0, or a number of at least 0.01")


def rising(text):
    """Positive integers that rise: "16,32" -> [16, 32]."""
    numbers = [positive_int(part) for part in text.split(",")]
    if any(a >= b for a, b in zip(numbers, numbers[1:])):
        raise argparse.ArgumentTypeError(f"must be integers that rise, such as 256,512, not {text!r}")
    return numbers


def json_object(text):
    """{name: value}, written as JSON."""
    try:
        json.dumps(value := json.loads(text), allow_nan=False)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'must be a JSON object such as {{"name": true}}, not {text!r}')
    return value


def url(text):
    """http://HOST:PORT, given with or without the /v1 of its API."""
    if found := re.fullmatch(r"(https?://[\w.:\[\]-]+)(/v1)?/?", text):
        return found[1]
    raise argparse.ArgumentTypeError(f"must be an address such as http://host:8000, not {text!r}")


def path(text):
    """A path with ~ expanded; a hub id or the name of a data set stays as it is."""
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"must name a file or directory, not {text!r}")
    return os.path.expanduser(text)
