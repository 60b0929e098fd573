"""The experiments. A package, or an installed package of this name would hide it."""
