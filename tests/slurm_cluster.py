"""A real SLURM of three nodes on this machine, for as long as tests need it."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

REQUIRE = "GLOWSCALE_REQUIRE_SLURM"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
NODES = ("node1", "node2", "node3")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
CONFIG = """\
ClusterName=glowscale
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldDebug=info
SlurmdDebug=info
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=1
FirstJobId={first_job}
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
KillWait=30
MinJobAge=3600
OverTimeLimit=0
MailProg=/bin/true
GresTypes=gpu
NodeName=DEFAULT CPUs=32 Gres=gpu:2
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP MaxTime=60 DefaultTime=10
"""


class ClusterError(RuntimeError):
    """A SLURM that does not do as told; the message ends with its logs."""


class SlurmCluster:
    """A running SLURM; `slurm_cluster` starts and ends one.

    Args:
        folder: its configuration, state, logs and sockets; a short path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        ours = {key: value for key, value in os.environ.items() if not _is_slurms(key)}
        self._environment = {**ours, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Start munged, slurmctld and a slurmd a node, and wait until all nodes take jobs."""
        folder = self.folder
        for name in ("state", *NODES):
            (folder / name).mkdir()
        host = socket.gethostname().partition(".")[0]
        ports = _free_ports(1 + len(NODES))
        config = CONFIG.format(
            host=host,
            folder=folder,
            port=ports[0],
            nodes="\n".join(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
                for name, port in zip(NODES, ports[1:], strict=True)
            ),
            first_job=random.SystemRandom().randrange(1000, 1_000_000),  # clusters side by side
        )
        (folder / "slurm.conf").write_text(config)
        (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/gpu[0-1]\n")
        for name in ("gpu0", "gpu1"):  # SLURM counts them; no job here uses one
            (folder / name).touch()
        key = folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        paths = [
            f"--{option}={folder}/munge.{end}"
            for option, end in (
                ("key-file", "key"),
                ("socket", "socket"),
                ("pid-file", "pid"),
                ("log-file", "log"),
                ("seed-file", "seed"),
            )
        ]
        self._launch("munged", ["munged", "--foreground", "--force", "--num-threads=2", *paths])
        self._until(lambda: (folder / "munge.socket").exists(), 20, "munged does not listen")
        self._launch("slurmctld", ["slurmctld", "-D", "-c"])
        for name in NODES:
            self.revive_node(name, wait=False)
        for name in NODES:
            self.wait_for_node(name)

    def stop(self) -> None:
        """End every daemon and every job."""
        for _ in range(3):  # what is starting a process while we look
            for process in self._processes_that(lambda process: self._holds(process, "")):
                _kill(process)
            for daemon in self._daemons.values():
                daemon.kill()
                daemon.wait()

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """What a client command of SLURM prints."""
        result = subprocess.run(
            command,
            env={**self._environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if check and result.returncode:
            raise ClusterError(f"{' '.join(command)}: {result.stderr}{result.stdout}")
        return result.stdout

    def submit(
        self,
        script: str | Path,
        *arguments: object,
        options: tuple[str, ...] = (),
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Submit a script with its arguments; the job's id.

        Args:
            script: path of the batch script.
            arguments: of the script.
            options: of sbatch.
            folder: to submit from.
            environment: variables beside this process's.
        """
        where = [f"--chdir={folder}"] if folder else []
        command = ["sbatch", "--parsable", *where, *options, str(script), *map(str, arguments)]
        result = subprocess.run(
            command,
            env={**self._environment, **(environment or {})},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if result.returncode:
            raise ClusterError(f"{' '.join(command)}: {result.stderr}")
        return result.stdout.strip().partition(";")[0]

    def facts(self, job: str) -> dict[str, str]:
        """All that SLURM tells of a job, or of an array's task ("12_3")."""
        line = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"(\S+?)=(\S*)", line.splitlines()[0]))

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED ..."""
        return self.facts(job)["JobState"]

    def restarts(self, job: str) -> int:
        """How often SLURM has requeued a job."""
        return int(self.facts(job)["Restarts"])

    def wait_for(self, job: str, *states: str, timeout: float = 120) -> str:
        """Wait until a job is in one of the states (default: has ended); which one."""
        wanted = states or ENDED
        self._until(
            lambda: self.state(job) in wanted,
            timeout,
            f"job {job} did not come to {' or '.join(wanted)}",
            lambda: str(self.facts(job)),
        )
        return self.state(job)

    def scancel(self, job: str, *options: str) -> None:
        """Cancel a job or, by options, send it a signal."""
        self.run("scancel", *options, job)

    def processes(self, job: str, name: str) -> list[psutil.Process]:
        """A job's processes (an array's task: "12_3") whose command line holds `name`."""
        number = self.facts(job)["JobId"]

        def is_of_job(process: psutil.Process) -> bool:
            variables = process.environ()
            ours = variables.get("SLURM_CONF") == self._environment["SLURM_CONF"]
            return (
                ours
                and variables.get("SLURM_JOB_ID") == number
                and any(name in part for part in process.cmdline())
            )

        return self._processes_that(is_of_job)

    def lose_node(self, name: str) -> None:
        """Kill a node's daemon and everything that runs there, as a power cut does."""
        daemon = self._daemons.pop(name)
        daemon.kill()
        daemon.wait()
        for process in self._processes_that(lambda process: self._holds(process, f"{name}.log")):
            with suppress(psutil.Error):
                children = process.children(recursive=True)
                _kill(process)
                for child in children:
                    _kill(child)

    def revive_node(self, name: str, wait: bool = True) -> None:
        """Start a node's daemon, as at boot."""
        self._launch(name, ["slurmd", "-D", "-N", name, "-b"])
        if wait:
            self.wait_for_node(name)

    def wait_for_node(self, name: str, *, up: bool = True) -> None:
        """Wait until SLURM finds a node fit for jobs, or lost."""

        def is_so() -> bool:
            told = self.run("scontrol", "--oneliner", "show", "node", name, check=False)
            state = re.search(r"State=(\S+)", told)
            words = re.split(r"[+*]", state[1]) if state else []
            fit = bool(words) and words[0] in ("IDLE", "MIXED", "ALLOCATED", "COMPLETING")
            lost = "DOWN" in words
            return (fit and "*" not in (state[1] if state else "")) if up else lost

        self._until(is_so, 60, f"{name} did not come {'up' if up else 'down'}")

    def logs(self) -> str:
        """The last lines of every daemon's log."""
        parts = []
        for path in sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")]):
            count = 25 if path.suffix == ".log" else 3
            lines = path.read_text(errors="replace").splitlines()[-count:]
            parts.append("\n".join([f"--- {path.name}", *lines]))
        return "\n".join(parts)

    def _launch(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                [_which(command[0]) or command[0], *command[1:]],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=self.folder,
                start_new_session=True,
            )

    def _until(
        self,
        condition: Callable[[], bool],
        timeout: float,
        complaint: str,
        facts: Callable[[], str] = str,
    ) -> None:
        end = time.monotonic() + timeout
        while not condition():
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    raise ClusterError(f"{name} ended with {daemon.returncode}.\n{self.logs()}")
            if time.monotonic() > end:
                raise ClusterError(f"{complaint} in {timeout} s. {facts()}\n{self.logs()}")
            time.sleep(0.4)

    def _processes_that(self, condition: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and condition(process):
                    found.append(process)
        return found

    def _holds(self, process: psutil.Process, file: str) -> bool:
        """Whether a process of this cluster has a file of it open; "": whether it is of it."""
        if file:
            log = str(self.folder / file)
            return "slurmstepd" in process.name() and any(
                opened.path == log for opened in process.open_files()
            )
        if process.environ().get("SLURM_CONF") == self._environment["SLURM_CONF"]:
            return True
        return any(self._holds(process, f"{name}.log") for name in NODES)


@contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A SLURM of three nodes; skips where it cannot be, fails if GLOWSCALE_REQUIRE_SLURM=1."""
    missing = [name for name in PROGRAMS if not _which(name)]
    reason = f"{', '.join(missing)} not installed" if missing else ""
    if os.getuid() != 0:
        reason = reason or "SLURM's daemons need root"
    if reason:
        if os.environ.get(REQUIRE) == "1":
            pytest.fail(f"{REQUIRE}=1, but {reason}")
        pytest.skip(f"no SLURM to test with: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # sockets need a short path
    cluster = SlurmCluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _is_slurms(key: str) -> bool:
    return key.startswith(("SLURM_", "SBATCH_", "SRUN_"))


def _free_ports(count: int) -> list[int]:
    """Ports below those that systems give away by themselves."""
    ports: list[int] = []
    candidates = random.SystemRandom().sample(range(30000, 32768), 200)
    for port in candidates:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise ClusterError("there are no free ports from 30000 to 32767")


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.Error):
        process.send_signal(signal.SIGKILL)
