"Sampling on real architectures: equal to transformers' generate, and to what the trainer says of the same tokens"
import pytest, torch
from ftkit.chat import set_template
from ftkit.core import FtkitError
from ftkit.rollout import HFEngine, Rollout, engine_finding, sample
from ftkit.tiny import tiny
from test_packing import DENSE, RECURRENT, build

@pytest.fixture(scope='module')
def tok():
    found,_ = tiny(vocab=260)
    set_template(found)
    return found

def prompts(n=5):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(4, 250, (3+4*k,), generator=g).tolist() for k in range(n)]

def engine(kind, tok, attention='sdpa', stops=()):
    model = build(kind, attention, **(DENSE | RECURRENT)[kind])
    made = HFEngine(model, tok, batch_size=8)
    made.stops = [*stops] or made.stops
    return made

def own_logps(model, rollout, temperature=1.):
    "From a plain forward pass over prompt and answer"
    ids = torch.tensor([rollout.prompt_ids + rollout.ids])
    with torch.no_grad(): logps = (model(input_ids=ids).logits[0].float()/temperature).log_softmax(-1)
    at = torch.arange(len(rollout.prompt_ids)-1, ids.shape[1]-1)
    return logps[at, ids[0, at+1]]

@pytest.mark.parametrize('attention', ['eager', 'sdpa'])
@pytest.mark.parametrize('kind', [*DENSE, *RECURRENT])
def test_every_token_is_the_trainers(kind, attention, tok):
    "Prompts of unlike length, longer than a sliding window; answers that end at different times"
    made = engine(kind, tok, attention, stops=range(4, 80)) # ends soon, so that rows leave the batch
    groups = sample(made, tok, prompts(), n=3, max_new_tokens=20, seed=1)
    rollouts = [r for g in groups for r in g]
    assert len({len(r.ids) for r in rollouts}) > 2 and any(r.stopped for r in rollouts)
    for r in rollouts:
        assert r.stopped == (r.ids[-1] in made.stops) and not any(i in made.stops for i in r.ids[:-1])
        assert r.stopped or len(r.ids) == 20
        torch.testing.assert_close(torch.tensor(r.logps), own_logps(made.model, r), atol=2e-5, rtol=1e-5)

@pytest.mark.parametrize('kind', ['qwen2', 'mistral', 'qwen3_next'])
def test_the_likeliest_answers_are_generates(kind, tok):
    made = engine(kind, tok)
    for group,p in zip(sample(made, tok, prompts(), n=2, max_new_tokens=10, temperature=0), prompts()):
        x = torch.tensor([p])
        out = made.model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=10, do_sample=False,
                                  eos_token_id=made.stops, pad_token_id=tok.pad_token_id)[0, len(p):].tolist()
        assert group[0].ids == group[1].ids == out[:len(group[0].ids)]

def test_answers_are_drawn_as_often_as_they_are_likely(tok):
    "The first token of 4,000 answers, with a temperature"
    made = HFEngine(build('llama', 'sdpa', initializer_range=.5), tok, batch_size=4000)
    p = prompts(1)[0]
    group, = sample(made, tok, [p], n=4000, max_new_tokens=1, temperature=2.)
    with torch.no_grad(): expected = (made.model(input_ids=torch.tensor([p])).logits[0, -1]/2).softmax(-1)
    found = torch.tensor([r.ids[0] for r in group]).bincount(minlength=260)/4000
    assert (found-expected).abs().max() < 5*(expected.max()/4000)**.5
    assert len({r.ids[0] for r in group}) > 20

def test_a_model_in_training_is_left_as_it_was(tok):
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(build('qwen2', 'sdpa'), LoraConfig(target_modules='all-linear', lora_dropout=.5))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    model.train()
    state = torch.get_rng_state()
    one,two = (sample(HFEngine(model, tok), tok, prompts(), n=2, max_new_tokens=5, seed=3) for _ in range(2))
    assert one == two and model.training and torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())

class Odd:
    "An engine with faults"
    def __init__(self, groups): self.groups = groups
    def sample(self, *args): return self.groups

@pytest.mark.parametrize('groups', [[], [[]], [[Rollout([1], [2], [0.], True)]*3]])
def test_an_engine_that_gives_too_little_is_named(groups, tok):
    with pytest.raises(FtkitError, match='Odd gave'): sample(Odd(groups), tok, ['?'], n=2)

NOW,BEFORE = [-1., -2., -3., -.5],[-1.4, -1.7, -3.2, -.9]
FAULTS = dict(clean=(NOW, None), rounding=([x+.01 for x in NOW], None), stale=(BEFORE, 'stale'),
              nearly_stale=([x+.01 for x in BEFORE], 'stale'),
              noise=([x+.4*(-1)**i for i,x in enumerate(NOW)], 'another'),
              text=([x-3 for x in NOW], 'another'), nan=([float('nan')]*4, 'no numbers'))

@pytest.mark.parametrize('fault', FAULTS)
def test_stale_weights_and_numerics_are_told_apart(fault):
    theirs,says = FAULTS[fault]
    found = engine_finding(theirs, NOW, BEFORE)
    assert found is None if says is None else says in found

def test_an_update_too_small_to_see_is_no_stale_engine():
    "Before and now the same within rounding: nothing can be said"
    assert engine_finding([-1.001, -2.], [-1., -2.], [-1., -2.]) is None
    assert engine_finding([-1., -2.], [-1.0001, -2.], None) is None
