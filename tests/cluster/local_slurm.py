"""A throw-away Slurm on one Debian or Ubuntu machine: several nodes, no accounting, nothing outside its folder but packages.

Run by itself it starts one and stops it again when its standard input ends: `python tests/cluster/local_slurm.py`.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")


def why_not() -> str:
    """Why no Slurm can be started here; empty if one can."""
    if os.geteuid() != 0:
        return "Slurm's daemons are started as root"
    if not all(map(shutil.which, ("slurmctld", "slurmd", "sbatch", "munged"))) and not shutil.which("apt-get"):
        return "Slurm is not installed, and there is no apt-get"
    return ""


def install() -> None:
    """Install Debian's packages; their services are not used."""
    if all(map(shutil.which, ("slurmctld", "slurmd", "sbatch", "munged"))):
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], env=environment, check=True, capture_output=True)
    command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
    subprocess.run(command, env=environment, check=True, capture_output=True)


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


class LocalSlurm:
    """Slurm with nodes n1, n2, …, each a daemon of this machine with one CPU.

    Args:
        folder: for its key, configuration, state and logs.
        n_nodes: how many nodes.
    """

    def __init__(self, folder: Path, n_nodes: int = 3) -> None:
        self.folder = folder
        self.nodes = [f"n{number + 1}" for number in range(n_nodes)]
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Self:
        install()
        for name in ("state", "spool", "log", "run"):
            (self.folder / name).mkdir(parents=True)
        self._configure()
        try:
            self._start_munge()
            self.call("slurmctld")
            for node in self.nodes:
                self.call("slurmd", "-N", node)
            self._wait_for_nodes()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _configure(self) -> None:
        controller, *ports = free_ports(1 + len(self.nodes))
        host, d = socket.gethostname().partition(".")[0], self.folder
        lines = [
            "ClusterName=local", f"SlurmctldHost={host}(127.0.0.1)", "SlurmUser=root", "SlurmdUser=root",
            "AuthType=auth/munge", f"AuthInfo=socket={d}/run/munge.socket,cred_expire=5", "CredType=cred/munge",
            f"SlurmctldPort={controller}", "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny",
            f"StateSaveLocation={d}/state", f"SlurmdSpoolDir={d}/spool/%n",
            f"SlurmctldPidFile={d}/run/slurmctld.pid", f"SlurmdPidFile={d}/run/slurmd.%n.pid",
            f"SlurmctldLogFile={d}/log/slurmctld.log", f"SlurmdLogFile={d}/log/slurmd.%n.log",
            "MailProg=/bin/true", "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "MpiDefault=none",
            "JobAcctGatherType=jobacct_gather/none", "AccountingStorageType=accounting_storage/none",
            "SelectType=select/cons_tres", "SelectTypeParameters=CR_CPU", "SchedulerType=sched/backfill",
            "SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0",
            "ReturnToService=2", "SlurmdParameters=config_overrides", "SlurmdTimeout=8", "KillWait=5", "JobRequeue=1",
            *(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=1000 State=UNKNOWN"
                for node, port in zip(self.nodes, ports, strict=True)
            ),
            "PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
        ]  # fmt: skip
        (d / "slurm.conf").write_text("\n".join(lines) + "\n")

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        run = self.folder / "run"
        options = {"key-file": key, "socket": run / "munge.socket", "pid-file": run / "munged.pid"}
        options |= {"log-file": self.folder / "log" / "munged.log", "seed-file": run / "munged.seed"}
        self.call("munged", "--force", *(f"--{name}={value}" for name, value in options.items()))

    def _wait_for_nodes(self) -> None:
        for _ in range(120):
            states = self.call("sinfo", "-h", "-N", "-o", "%t", check=False).split()
            if states.count("idle") == len(self.nodes):
                return
            time.sleep(0.25)
        raise RuntimeError(f"nodes are {states}; see {self.folder}/log")

    def call(self, *words: str, check: bool = True) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr}")
        return done.stdout

    def jobs(self, state: str = "R") -> dict[str, str]:
        """Jobs in a state, each with its node (empty where it waits)."""
        lines = self.call("squeue", "-h", "-r", "-t", state, "-o", "%i|%N").splitlines()
        return dict(line.split("|", 1) for line in lines)

    def fail_node(self, node: str) -> None:
        """Kill a node's daemon and everything that runs on it, as a crash does."""
        pids = [self._pid(f"slurmd.{node}"), *self._processes(node)]
        for pid in filter(None, pids):
            _kill(pid, signal.SIGKILL)

    def _processes(self, node: str) -> list[int]:
        """Processes of jobs on a node: they carry its name and this cluster's configuration."""
        mine = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.folder / 'slurm.conf'}".encode()}
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and mine <= set((entry / "environ").read_bytes().split(b"\0")):
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    step = "slurmstepd" in Path(f"/proc/{parent}/comm").read_text()  # it would report the death
                    found += [parent, int(entry.name)] if step else [int(entry.name)]
            except OSError:
                continue
        return found

    def _pid(self, name: str) -> int:
        try:
            return int((self.folder / "run" / f"{name}.pid").read_text())
        except (OSError, ValueError):
            return 0

    def stop(self) -> None:
        """End all jobs and daemons."""
        if jobs := [job for state in ("R", "PD") for job in self._jobs_quietly(state)]:
            self.call("scancel", *jobs, check=False)
            time.sleep(1)
        for name in (*(f"slurmd.{node}" for node in self.nodes), "slurmctld", "munged"):
            pid = self._pid(name)
            if pid and _kill(pid, signal.SIGTERM):
                _wait_for_end(pid)

    def _jobs_quietly(self, state: str) -> Sequence[str]:
        try:
            return list(self.jobs(state))
        except (RuntimeError, subprocess.TimeoutExpired, OSError):
            return []


def _kill(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _wait_for_end(pid: int) -> None:
    for _ in range(60):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.25)
    _kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    import tempfile

    if problem := why_not():
        sys.exit(problem)
    with tempfile.TemporaryDirectory() as place, LocalSlurm(Path(place) / "slurm") as slurm:
        print(f"export SLURM_CONF={slurm.environment['SLURM_CONF']}", flush=True)
        sys.stdin.read()
