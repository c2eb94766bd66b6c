"""What pyproject.toml cannot say: `configs/` is installed inside of the package `latentmill`."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["latentmill*", "launch*", "pipeline*"]),
        "latentmill.configs",
    ],
    package_dir={"latentmill.configs": "configs"},
)
