"Programs that try to get out, stay, or take the machine down"
import contextlib, os, tempfile, time
import pytest
from ftkit import sandbox
from ftkit.core import FtkitError
from ftkit.sandbox import protection, run_code

pytestmark = pytest.mark.skipif(not all(protection().values()) or not protection(), reason='this kernel cannot hold it')

SYSCALL = 'import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n'
FORBIDDEN = {
    'fork': 'import os; os.fork()', 'spawn': 'import os; os.posix_spawn("/bin/true", ["true"], {})',
    'system': 'import os; print(os.system("echo out"))', 'multiprocessing': 'import multiprocessing as m\nm.Pool(2)',
    'fork by number': SYSCALL + 'print("child", libc.syscall(57))', 'vfork': SYSCALL + 'print("child", libc.vfork())',
    'clone3': SYSCALL + 'print("child", libc.syscall(435, b"\\0"*88, 88))',
    'x32 fork': SYSCALL + 'print("child", libc.syscall(0x40000039))',
    'tcp': 'import socket; socket.socket()', 'udp': 'import socket; socket.socket(type=socket.SOCK_DGRAM)',
    'http': 'import urllib.request as u; print("got", u.urlopen("http://127.0.0.1").read())',
    'kill all': 'import os; os.kill(-1, 9)', 'more memory': 'import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1))',
    'ptrace': SYSCALL + f'print("child", libc.ptrace(16, {os.getpid()}, 0, 0))',
    'passwords': 'print("got", open("/etc/passwd").read())', 'proc': 'print("got", open("/proc/self/environ").read())',
    'shared memory': 'open("/dev/shm/ftkit_was_here", "w")', 'temp': 'open("/tmp/ftkit_was_here", "w")',
    'link': 'import os; os.symlink("/etc/passwd", "p"); print("got", open("p").read())',
    'rights': 'import os; os.chmod("/tmp", 0o777)', 'times': 'import os; os.utime("/tmp", (0, 0))',
    'owner': 'import os; os.chown("/tmp", 0, 0)', 'priority': 'import os; os.setpriority(0, os.getppid(), 19)',
    'signal': SYSCALL + 'print("child", libc.syscall(129, 1, 0, 0))',
    'memory that stays': SYSCALL + 'print("child", libc.shmget(1234, 4096, 0o1600))',
    'up': 'print("got", open("../../etc/passwd").read())', 'remove': 'import os; os.remove("/tmp")'}

COUNTED = 'system', 'fork by number', 'vfork', 'clone3', 'x32 fork', 'ptrace', 'signal', 'memory that stays' # print -1

@pytest.mark.parametrize('name', FORBIDDEN)
def test_is_refused(name):
    done = run_code(FORBIDDEN[name], seconds=2)
    got = [line for line in done.output.splitlines() if 'got' in line or 'out' in line
           or 'child' in line and not line.endswith('-1')]
    assert not got and (not done.ok or name in COUNTED)
    assert not os.path.exists('/dev/shm/ftkit_was_here') and not os.path.exists('/tmp/ftkit_was_here')

THREADS = 'import threading\ndef f():\n    while True: pass\nfor _ in range(4): threading.Thread(target=f).start()'
LIMITED = {
    'loop': ('while True: pass', 'timeout'), 'sleep': ('import time; time.sleep(99)', 'timeout'),
    'threads': (THREADS, 'timeout'),
    'ignores the limit': ('import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass', None),
    'memory': ('x = [0]*10**10', 'memory'), 'big number': ('print(9**9**9)', None),
    'deep': ('def f(): f()\nf()', 'RecursionError'),
    'exit': ('import sys; sys.exit(3)', 'exit 3'), 'crash': ('import ctypes; ctypes.string_at(0)', 'killed')}

@pytest.mark.parametrize('name', LIMITED)
def test_is_limited(name):
    program,why = LIMITED[name]
    start = time.time()
    done = run_code(program, seconds=1)
    assert not done.ok and time.time()-start < 4 and (why is None or done.why == why), done

def test_output_is_cut():
    done = run_code('while True: print("x"*1000)', seconds=2, output=2**14)
    assert not done.ok and len(done.output) == 2**14
    done = run_code('open("big", "wb").write(b"x"*10**9)')
    assert not done.ok and done.why in ('OSError', 'memory')

def test_nothing_is_left(tmp_path, monkeypatch):
    "No process, no file, after programs that were killed; and the broken twin: a folder that nobody removes"
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    before = children() # other tests' helpers, such as torch's compiler
    for program in ('open("kept", "w").write("x")\nwhile True: pass', THREADS): run_code(program, seconds=1)
    time.sleep(.2)
    assert children() <= before and not os.listdir(tmp_path)
    monkeypatch.setattr(sandbox, '_folder', lambda: contextlib.nullcontext(tempfile.mkdtemp()))
    run_code('open("kept", "w").write("x")')
    left, = os.listdir(tmp_path)
    assert os.listdir(tmp_path/left) == ['kept']

def children(): return {p for p in os.listdir('/proc') if p.isdigit() and parent(p) == os.getpid()}

def parent(pid):
    try: return int(open(f'/proc/{pid}/stat').read().rsplit(')', 1)[1].split()[1])
    except (OSError, IndexError): return None

def test_what_honest_programs_print():
    assert run_code('print("é ٣ 漢")').output == 'é ٣ 漢\n'
    assert not run_code('\udcff').ok and run_code('def').why == 'SyntaxError'
    done = run_code('import asyncio, dataclasses, decimal, itertools, re, statistics, tempfile, typing\n'
                    'async def f(): return 7\nprint(asyncio.run(f()))')
    assert done.ok and done.output == '7\n', done

@pytest.mark.parametrize('missing', ['landlock', 'seccomp'])
def test_a_machine_that_cannot_hold_it_runs_nothing(monkeypatch, missing):
    "And the broken twin: with the fence away, the fence is what kept it"
    calls = dict(landlock="landlock(asked['folders'])", seccomp='seccomp()')
    child = sandbox._CHILD.replace(f'{missing}={calls[missing]}', f'{missing}=False')
    monkeypatch.setattr(sandbox, '_CHILD', child)
    with pytest.raises(FtkitError, match='cannot hold a program'): run_code('print(1)')
    assert run_code('print(1)', unprotected=True).output == '1\n'
    spies = dict(landlock='print("got", len(open("/etc/passwd").read()))',
                 seccomp='import socket; socket.socket(); print("got")')
    assert 'got' in run_code(spies[missing], unprotected=True).output

def test_no_program_ends_the_run_that_called_it(monkeypatch, tmp_path):
    "An exit code of ours, a folder too deep to remove; nothing is left"
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path)) # others put things into the one that all share
    assert run_code('import os; os._exit(99)').why == 'exit 99'
    assert run_code('import os\nfor _ in range(1500): os.mkdir("d"); os.chdir("d")').ok
    assert not os.listdir(tmp_path)

def test_what_is_run_after_a_program():
    done = run_code('x = 3', 'assert x == 3', 'word')
    assert done.ok and done.output == '\nword\n'
    assert run_code('x = 4', 'assert x == 3', 'word').why == 'AssertionError'
    assert 'word' not in run_code('import os; os._exit(0)', 'pass', 'word').output
