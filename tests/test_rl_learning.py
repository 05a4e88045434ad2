"Reinforcement learning on the embedded model: held-out tasks solved, from where SFT left it"
import time
import pytest
from ftkit.evaluate import exact_match
from ftkit.models import load_model, load_tokenizer, load_tuned
from ftkit.rewards import solved
from ftkit.rl import rl
from ftkit.tasks import check, rows
from ftkit.train import train

FAMILIES = 'add', 'spell', 'reverse', 'opposite'

def right(model, tok):
    return exact_match(model, tok, rows(200, 'test', families=FAMILIES), check, max_new_tokens=16).accuracy

@pytest.fixture(scope='module')
def taught(tmp_path_factory):
    "(folder of a model that has been shown the form of an answer, what it solves)"
    tok = load_tokenizer('embedded')
    model = load_model('embedded', tok)
    found = train(model, tok, rows(1600, families=FAMILIES), out=tmp_path_factory.mktemp('taught')/'run', max_steps=80,
                  learning_rate=3e-3, per_device_train_batch_size=16)
    return found.path, right(model, tok)

def case(algorithm, seed, gain, **more):
    "One seed in every run of the tests, the others with `-m slow`; PPO, which is slow, learns on the page of the loop"
    late = [pytest.mark.slow]*(seed > 1 or algorithm == 'ppo')
    return pytest.param(algorithm, seed, gain, more, id=f'{algorithm} {seed}', marks=late)

PPO = dict(steps=120, prompts_per_step=128, learning_rate=5e-4)

@pytest.mark.parametrize('algorithm,seed,gain,more', [
    case('grpo', 1, .25, steps=200), case('grpo', 2, .25, steps=200), # the page of the loop has seed 0
    *(case(a, seed, .15, **more) for a,more in (('rloo', dict(steps=120)), ('ppo', PPO)) for seed in (1, 2, 3))])
def test_more_held_out_tasks_are_solved(taught, tmp_path, algorithm, seed, gain, more):
    folder,before = taught
    tok,model = load_tuned(folder, trainable=True)
    asked = [dict(prompt=r['messages'][0]['content'], family=r['family'], answer=r['answer'])
             for r in rows(1200, families=FAMILIES, seed=seed+1)]
    start,options = time.time(),dict(prompts_per_step=16, max_new_tokens=16, learning_rate=1e-3, micro_tokens=100_000)
    run = rl(model, tok, asked, solved, algorithm, tmp_path/'run', seed=seed, **options | more)
    after = right(model, tok)
    first,last = run.log[0]['reward'],run.log[-1]['reward']
    print(f'{algorithm}, seed {seed}: {before:.0%} to {after:.0%}; reward {first:.2f} to {last:.2f}; '
          f'{time.time()-start:.0f} s')
    assert before < .6 and after >= before + gain
