"""The command line of every stage: its docstring as it stands, flags in groups, each with its default."""

import argparse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help that keeps the docstring's lines and names defaults."""


def stage_parser(docstring):
    return argparse.ArgumentParser(description=docstring, formatter_class=HelpFormatter)
