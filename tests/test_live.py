"A run that is watched: an interrupt ends it after its step, and is otherwise what it always was"
import signal
import pytest
from transformers import TrainerCallback
from ftkit.chat import set_template
from ftkit.live import _Ear, monitor
from ftkit.rewards import exact_match
from ftkit.rl import rl
from ftkit.tasks import rows
from ftkit.tiny import tiny
from ftkit.train import last_checkpoint, train

@pytest.fixture(autouse=True)
def interruptible():
    "As in a notebook; a shell's background job ignores interrupts"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)

class Interrupts(TrainerCallback):
    "Interrupts at the beginning of some steps, as many times as they are named"
    def __init__(self, *steps): self.steps = steps
    def on_step_begin(self, args, state, control, **kwargs):
        for step in self.steps:
            if step == state.global_step+1: signal.raise_signal(signal.SIGINT)

@pytest.fixture
def run(tmp_path):
    def go(*callbacks):
        tok,model = tiny()
        set_template(tok, 'chatml')
        model.resize_token_embeddings(len(tok))
        return train(model, tok, rows(40), out=tmp_path/'run', overwrite=True, max_steps=5,
                     per_device_train_batch_size=4, callbacks=[*callbacks])
    return go

def test_an_interrupt_ends_a_run_after_its_step(run):
    before = signal.getsignal(signal.SIGINT)
    done = run(monitor(), Interrupts(3))
    assert done.log[-1]['step'] == 3 and any(done.adapter.iterdir())
    assert signal.getsignal(signal.SIGINT) == before

def test_a_second_one_breaks_off(run):
    with pytest.raises(KeyboardInterrupt): run(monitor(), Interrupts(3, 3))

def test_without_a_monitor_the_first_one_does(run):
    with pytest.raises(KeyboardInterrupt): run(Interrupts(3))

def test_outside_of_a_run_nothing_is_swallowed():
    before,ear = signal.getsignal(signal.SIGINT),_Ear()
    ear.listen()
    with pytest.raises(KeyboardInterrupt): signal.raise_signal(signal.SIGINT)
    assert not ear.heard and signal.getsignal(signal.SIGINT) == before

@pytest.fixture
def learns(tmp_path):
    def go(reward=exact_match, **options):
        tok,model = tiny()
        set_template(tok, 'chatml')
        model.resize_token_embeddings(len(tok))
        return rl(model, tok, [dict(prompt='1 + 1', answer='2')]*4, reward, out=tmp_path/'rl', overwrite=True,
                  prompts_per_step=2, group=2, max_new_tokens=4, **options)
    return go

def test_reinforcement_learning_is_watched_and_stopped(learns):
    seen,drawn = [],monitor()
    def watch(folder, log, steps):
        seen.append((len(log), steps))
        if len(log) == 2: (folder/'stop').touch()
        return drawn(folder, log, steps)
    done = learns(steps=5, watch=watch)
    assert seen == [(1, 5), (2, 5)] and len(done.log) == 2 and not (done.path/'stop').exists()
    assert last_checkpoint(done.path).name == 'checkpoint-2' and any(done.adapter.iterdir())

def test_an_interrupt_ends_it_too(learns):
    before,drawn = signal.getsignal(signal.SIGINT),monitor()
    def reward(completions, **_):
        if drawn.flag: signal.raise_signal(signal.SIGINT)
        return [1.]*len(completions)
    done = learns(reward, steps=5, watch=drawn)
    assert len(done.log) == 2 and signal.getsignal(signal.SIGINT) == before
