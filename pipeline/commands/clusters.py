"""`latentmill slurm` and `latentmill k8s`: a job's script or manifest, printed or submitted."""

import argparse


class ClusterVerb:
    """A verb for one kind of cluster: they differ in options, and in the text that they print."""

    def __init__(self, place: str, text: str) -> None:
        self.__name__ = place
        self.HELP = f"print the {text}, or submit it"

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None:
        """Add the arguments of the job, and of the cluster."""
        from launch.start import PLACES, add_cluster_arguments

        add_cluster_arguments(parser, PLACES[self.__name__])
        parser.usage = "%(prog)s CONFIG [a.b=c ...] [options]"
        parser.set_defaults(call=self.run)

    def run(self, arguments: argparse.Namespace) -> int:
        """Print the text or submit it; return the exit code."""
        from launch.start import PLACES, start

        return start(PLACES[self.__name__], arguments)


slurm = ClusterVerb("slurm", "script of a job on a Slurm cluster")
k8s = ClusterVerb("k8s", "manifest of a job on Kubernetes")
