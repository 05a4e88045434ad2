"What importing costs: no torch for data modules, half a second at most"
import re, subprocess, sys
from pathlib import Path
import pytest

LIGHT = 'core tasks formats chat mask lengths pack audit mix tiny show'.split()
HEAVY = 'torch transformers datasets peft bitsandbytes trl vllm unsloth matplotlib ipywidgets pandas'.split()

def loaded_by(statement):
    "Names of the modules loaded by a statement, and the seconds it took, in a fresh process"
    command = [sys.executable, '-X', 'importtime', '-c', statement]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    lines = [re.match(r'import time:\s+(\d+) \|\s+(\d+) \| (\s*)(\S+)', line) for line in out.splitlines()]
    found = [m for m in lines if m]
    return {m[4] for m in found}, sum(int(m[1]) for m in found)/1e6

def test_data_modules_load_no_torch():
    names,_ = loaded_by('import ' + ', '.join(f'ftkit.{m}' for m in LIGHT))
    assert {n.split('.')[0] for n in names} & set(HEAVY) == set()

def test_the_probe_sees_a_heavy_import():
    assert 'matplotlib' in loaded_by('import matplotlib')[0]

def test_import_takes_less_than_half_a_second():
    # the best of three, as the first one may compile bytecode and others may share the machine
    assert min(loaded_by('import ftkit, ftkit.formats, ftkit.tasks')[1] for _ in range(3)) < .5

@pytest.mark.parametrize('module', [p.stem for p in sorted((Path(__file__).parents[1]/'ftkit').glob('[a-z]*.py'))])
def test_no_module_needs_an_optional_package(module):
    names,_ = loaded_by(f'import ftkit.{module}')
    assert {n.split('.')[0] for n in names} & {'peft', 'bitsandbytes', 'trl', 'vllm', 'unsloth'} == set()
