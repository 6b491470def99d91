"""Launchers, as one types them: a grid on two processes, one that fails stops the other, and every launcher comes to the same weights."""
import socket
import subprocess
import sys
import time

import pytest

from robustcv.core import load_records

def torchrun(*args, timeout=300):
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, args)]
    return subprocess.run(call, capture_output=True, text=True, timeout=timeout)

def test_a_grid_on_two_processes(tmp_path):
    done = torchrun("-m", "robustcv", "run", "baseline", "--scale", "smoke", "--only", "plain", "--device", "cpu",
                    "--results", tmp_path/"results", "--folder", tmp_path/"runs")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": validation") == 1 and done.stdout.count("baseline: scale smoke") == 1 and len(load_records(tmp_path/"results")) == 1

def test_a_process_that_fails_stops_the_others(tmp_path):
    (tmp_path/"script.py").write_text("""
import os, torch
from robustcv.data import ImageSet
from robustcv.training import Training, cross_entropy, fit
def objective(model, batch, backward):
    if os.environ["RANK"] == "1": raise RuntimeError("the second process has had enough")
    return cross_entropy(model, batch)
images = ImageSet(torch.zeros(16, 3, 8, 8, dtype=torch.uint8), torch.arange(16) % 2, ("a", "b"))
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
fit(model, images, images, objective, config=Training(epochs=2, batch_size=8, lr=.01), device="cpu")
""")
    start = time.monotonic()
    done = torchrun(tmp_path/"script.py")
    assert done.returncode != 0 and "the second process has had enough" in done.stderr and time.monotonic() - start < 120

SCRIPT = """
import os, torch
from accelerate import notebook_launcher
from robustcv.data import ImageSet
from robustcv.training import Training, cross_entropy, fit
def train():
    images = ImageSet(torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 2, ("a", "b"))
    torch.manual_seed(int(os.environ["RANK"])) # all start from the first process's weights
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    history = fit(model, images, images, cross_entropy, config=Training(epochs=3, batch_size=8, lr=.01), device="cpu")
    os.write(1, f"\\nof {os.environ['WORLD_SIZE']} {history.loss.round(6).tolist()} {model[1].weight.sum().item()}\\n".encode()) # in one piece
"""

def lines(*calls):
    "What the processes of all calls print, a set without repetition and how many lines there are."
    running = [subprocess.Popen([sys.executable, *map(str, c)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in calls]
    out, errors = zip(*[p.communicate(timeout=300) for p in running], strict=True)
    assert not any(p.returncode for p in running), "\n".join(errors)
    found = [line for text in out for line in text.splitlines() if line.startswith("of ")]
    return set(found), len(found)

@pytest.mark.skipif(sys.platform != "linux", reason="names of threads are read from /proc")
def test_no_thread_of_the_group_is_left_when_the_interpreter_goes(tmp_path):
    (tmp_path/"script.py").write_text(SCRIPT + """train()
from pathlib import Path
from robustcv.processes import _leave
threads = lambda: sum("gloo" in f.read_text() for f in Path("/proc/self/task").glob("*/comm"))
before = threads(); _leave(); os.write(1, f"\\nof threads {before > 0} {threads()}\\n".encode())
""")
    found, _ = lines(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, tmp_path/"script.py"])
    assert {line for line in found if "threads" in line} == {"of threads True 0"}

@pytest.mark.parametrize("launcher", ["notebook_launcher", "accelerate launch", "two machines"])
def test_every_launcher_comes_to_the_weights_of_torchrun(launcher, tmp_path):
    script = tmp_path/"script.py"; script.write_text(SCRIPT + "train()")
    expected = lines(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, script])
    with socket.socket() as s: s.bind(("localhost", 0)); port = s.getsockname()[1]
    machine = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 1, "--master_addr", "localhost", "--master_port", port, "--node_rank"]
    accelerate = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1,
                  "--mixed_precision", "no", "--dynamo_backend", "no"]
    calls = {"notebook_launcher": [["-c", SCRIPT + "notebook_launcher(train, num_processes=2)"]], "accelerate launch": [[*accelerate, script]],
             "two machines": [[*machine, 0, script], [*machine, 1, script]]}
    assert lines(*calls[launcher]) == expected and len(expected[0]) == 1 and expected[1] == 2

def test_a_process_that_is_late_finds_the_network_that_the_first_has_trained_meanwhile(tmp_path):
    (tmp_path/"script.py").write_text(f"""
import os, sys, time
from robustcv import grids, single_run
from robustcv.experiments import run_section
from robustcv.grids import Run
from robustcv.perturbations import Perturbation
net = "shufflenet_v2_x0_5"
runs = [Run("tiny", "a", net), *[Run("tiny", n, net, start=("tiny", "a"), first="head") for n in "bc"], Run("tiny", "d", net, training=dict(lr=.01))]
grids.SECTIONS["tiny"] = lambda: runs
usual = single_run.standard_perturbations
def slow(x, y, model): time.sleep(3*int(os.environ["RANK"])); return x
single_run.standard_perturbations = lambda: [*usual()[:1], Perturbation("slow", slow)]
run_section("tiny", "smoke", results="{tmp_path}/results", folder="{tmp_path}/runs", cache="{tmp_path}/cache", device="cpu")
""")
    done = torchrun(tmp_path/"script.py")
    assert done.returncode == 0, done.stderr[:3000]
    assert [r["name"] for r in load_records(tmp_path/"results")] == list("abcd")
