"The loop: its update equals TRL's on the same rollouts, laws, faults, kills"
import json, os, random, signal, subprocess, sys, time
import pytest, torch
from ftkit.answers import AnswerCollator, best_layout
from ftkit.chat import set_template
from ftkit.core import FtkitError
from ftkit.logps import Head, head as find_head
from ftkit.rl import ALGORITHMS, Group, _critic, answer_losses, batches, choices, divisor, rehearse, rl, set_gains
from ftkit.rollout import HFEngine, Rollout
from ftkit.tiny import tiny
from ftkit.train import read_log

N,G,LIMIT = 3,4,12
END = tiny()[0].eos_token_id

def start(kind='lora', seed=0):
    from peft import LoraConfig, get_peft_model
    tok,model = tiny(seed=seed)
    set_template(tok)
    torch.manual_seed(0)
    config = LoraConfig(task_type='CAUSAL_LM', r=4, target_modules='all-linear')
    return (get_peft_model(model, config) if kind == 'lora' else model), tok

def fixed(seed=0):
    "Groups of random answers of unlike length, some cut off, with rewards; the second group has no spread"
    rng,groups = random.Random(seed),[]
    for k in range(N):
        prompt = [rng.randint(5, 250) for _ in range(3+4*k)]
        sizes = [rng.randint(1, LIMIT) for _ in range(G)]
        ids = [[rng.randint(5, 250) for _ in range(n)] for n in sizes]
        made = [Rollout(prompt, i[:-1] + [END] if len(i) < LIMIT else i, [-1.]*len(i), len(i) < LIMIT) for i in ids]
        scores = [[.5]]*G if k == 1 else [[round(rng.random(), 3)] for _ in range(G)]
        groups.append(Group(dict(prompt=f'question {k}'), made, scores))
    return groups

def gradients(model):
    return {n.replace('.default', ''): p.grad.clone() for n,p in model.named_parameters() if p.grad is not None}

def judge(model, how):
    "A critic with an opinion, if there is one"
    if how.baseline != 'critic': return None
    made = _critic(model, find_head(model))
    torch.manual_seed(1)
    for p in made.parameters(): torch.nn.init.normal_(p, std=.3)
    return made

def ours(how, layout=None, **more):
    "(loss, gradients) of a step of ours"
    model,tok = start()
    whole = find_head(model)
    collator = AnswerCollator(tok, model, layout or best_layout(model, tok))
    policy = collator, model, Head(whole.layer, whole.scale/how.temperature, whole.softcap), None, judge(model, how)
    groups = fixed()
    set_gains(groups, how, *policy)
    loss = 0
    for batch in batches(groups, how, *policy):
        x = answer_losses(model, policy[2], batch, how, {}, policy[-1]).sum()/divisor(groups, how)
        x.backward()
        loss += x.item()
    return loss, gradients(model)

def trls(tmp_path, **config):
    "The same by TRL's GRPOTrainer or RLOOTrainer, which are handed the rollouts"
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    model,tok = start()
    groups,seen = fixed(),{}
    worth = {tuple(r.ids): s[0] for g in groups for r,s in zip(g.rollouts, g.scores)}
    by = {g.row['prompt']: g for g in groups}
    def rollouts(prompts, trainer):
        count,out = {},dict(prompt_ids=[], completion_ids=[], logprobs=None)
        for p in prompts:
            r = by[p].rollouts[count.setdefault(p, 0)]
            count[p] += 1
            out['prompt_ids'].append(r.prompt_ids)
            out['completion_ids'].append(r.ids)
        return out
    def reward(completions, completion_ids, **_): return [worth[tuple(i)] for i in completion_ids]
    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **_): seen.update(gradients(model))
    args = GRPOConfig(str(tmp_path/'trl'), max_steps=1, per_device_train_batch_size=N*G, num_generations=G,
        max_completion_length=LIMIT, use_cpu=True, bf16=False, report_to='none', disable_tqdm=True, max_grad_norm=1e9,
        gradient_checkpointing=False, shuffle_dataset=False, logging_steps=1, **config)
    data = Dataset.from_list([dict(prompt=g.row['prompt']) for g in groups])
    trainer = GRPOTrainer(model, reward, args=args, train_dataset=data, processing_class=tok, rollout_func=rollouts,
                          callbacks=[Look()])
    trainer.train()
    return trainer.state.log_history[0]['loss'], seen

CASES = {
    'grpo': (dict(), {}), 'bnpo': (dict(), {}), 'dr_grpo': (dict(), dict(scale_rewards='none')),
    'dapo': (dict(resample=0), dict(epsilon_high=.28)), 'cispo': (dict(), dict(epsilon_high=5.)),
    'gspo': (dict(), dict(loss_type='grpo', importance_sampling_level='sequence')),
    'batch scale': (dict(scale='batch'), dict(loss_type='grpo', scale_rewards='batch')),
    'no scale': (dict(scale='none'), dict(loss_type='grpo', scale_rewards='none')),
    'temperature': (dict(temperature=.7), dict(loss_type='grpo', temperature=.7)),
    'truncated': (dict(loss_type='dapo', mask_truncated=True), dict(loss_type='dapo', mask_truncated_completions=True)),
    'undecided': (dict(loss_type='dapo', top_entropy=.4), dict(loss_type='dapo', top_entropy_quantile=.4)),
    'delta': (dict(delta=1.5), dict(loss_type='grpo', delta=1.5))}

@pytest.mark.parametrize('case', CASES)
def test_the_update_equals_trls(tmp_path, case):
    mine,theirs = CASES[case]
    how = choices(case if case in ALGORITHMS else 'grpo', group=G, prompts_per_step=N, max_new_tokens=LIMIT, **mine)
    if case == 'gspo': theirs = theirs | dict(epsilon=3e-4, epsilon_high=4e-4)
    loss,grads = ours(how)
    expected,wanted = trls(tmp_path, **dict(loss_type=case if case in ALGORITHMS else 'grpo', temperature=1.) | theirs)
    assert abs(loss-expected) < 1e-5
    assert grads.keys() == wanted.keys() and max(g.abs().max() for g in wanted.values()) > 1e-3
    for n in wanted: torch.testing.assert_close(grads[n], wanted[n], atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('algorithm', ALGORITHMS)
def test_layouts_and_micro_batches_change_nothing(algorithm):
    "Packed, padded, one group at a time: the same gradient"
    how = lambda **o: choices(algorithm, group=G, prompts_per_step=N, max_new_tokens=LIMIT, minibatches=1, **o)
    loss,whole = ours(how())
    for other in (ours(how(), 'padded'), ours(how(), 'packed'), ours(how(micro_tokens=1))):
        assert abs(other[0]-loss) < 1e-6
        for n in whole: torch.testing.assert_close(other[1][n], whole[n], atol=1e-6, rtol=1e-4)

def test_groups_without_spread_cost_nothing():
    model,tok = start()
    how = choices('grpo', group=G, prompts_per_step=N, max_new_tokens=LIMIT)
    groups,collator = fixed(),AnswerCollator(tok, model)
    set_gains(groups, how)
    held = batches(groups, how, collator, model, find_head(model), None)
    assert sum(len(b['lengths']) for b in held) == (N-1)*G and divisor(groups, how) == N*G

# the loop

ROWS = [dict(prompt=f'{a} and {b}?', answer=str(a)) for a in range(9) for b in range(9)]
def vowels(completions, **_): return [sum(t in 'aeiou' for t in c)/10 for c in completions] # texts, as the prompts are
def flat(completions, **_): return [1.]*len(completions)
QUICK = dict(steps=4, prompts_per_step=4, group=4, max_new_tokens=6, learning_rate=1e-2, save_steps=2, eval_steps=2)

def test_with_all_rewards_equal_not_a_bit_moves(tmp_path):
    model,tok = start()
    before = {n: p.clone() for n,p in model.named_parameters()}
    run = rl(model, tok, ROWS, flat, 'grpo', tmp_path/'run', weight_decay=.1, **QUICK)
    assert all(torch.equal(p, before[n]) for n,p in model.named_parameters())
    assert [e['grad_norm'] for e in run.log] == [0.]*4 and run.log[-1]['spread'] == 0

def test_ppo_equals_a_plain_one():
    "One answer at a time: forward pass, advantages by their definition, clipped losses, all written out"
    options = dict(group=G, prompts_per_step=N, max_new_tokens=LIMIT, gae_gamma=.95, gae_lambda=.8, minibatches=1)
    how = choices('ppo', **options)
    loss,grads = ours(how)
    model,_ = start()
    critic,each = judge(model, how),[]
    for r,score in ((r, s[0]) for g in fixed() for r,s in zip(g.rollouts, g.scores)):
        out,k = model(input_ids=torch.tensor([r.prompt_ids + r.ids]), output_hidden_states=True),len(r.prompt_ids)-1
        logps = out.logits[0, k:-1].log_softmax(-1)[range(len(r.ids)), r.ids]
        values = out.hidden_states[-1][0, k:-1] @ critic.weight[0] + critic.bias
        v = values.tolist() + [0.]
        wrong = [(score if t == len(r.ids)-1 else 0.) + .95*v[t+1] - v[t] for t in range(len(r.ids))]
        gains = [sum((.95*.8)**(j-t)*wrong[j] for j in range(t, len(r.ids))) for t in range(len(r.ids))]
        each.append((logps, values, torch.tensor(gains)))
    logps,values,gains = map(torch.cat, zip(*each))
    white = (gains - gains.mean())/(gains.std(correction=0) + 1e-8)
    ratio = (logps - logps.detach()).exp()
    policy = -torch.minimum(ratio*white, ratio.clamp(.8, 1.2)*white)
    x = (policy + .5*(values - (gains + values.detach()))**2).mean()
    x.backward()
    assert abs(x.item() - loss) < 1e-6
    for n,g in gradients(model).items(): torch.testing.assert_close(grads[n], g, atol=1e-6, rtol=1e-4)

def test_the_price_of_distance_comes_with_each_token():
    "A policy that has moved: with a price the advantages are those of rewards less the log-ratios"
    from ftkit.ppo import gae
    from ftkit.reference import Reference
    model,tok = start()
    began = Reference(model, 'adapter')
    for n,p in model.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(p, std=.3)
    how = lambda beta: choices('ppo', group=G, prompts_per_step=N, max_new_tokens=LIMIT, minibatches=1, scale='none',
                               beta=beta)
    def held(beta):
        policy = AnswerCollator(tok, model), model, find_head(model), began, judge(model, how(beta))
        set_gains(groups := fixed(), how(beta), *policy)
        batch, = batches(groups, how(beta), *policy)
        return batch
    free,priced = held(0.),held(.5)
    mask = torch.arange(free['longest']) < free['lengths'][:, None]
    taken,_ = gae(-.5*(priced['old'] - priced['ref'])*mask, torch.zeros_like(priced['old']), mask)
    assert taken.abs().max() > .1
    torch.testing.assert_close(priced['gains'], free['gains'] + taken, atol=1e-5, rtol=1e-4)

def test_unscored_and_cut_off_answers_teach_no_critic():
    model,tok = start()
    how = choices('ppo', group=G, prompts_per_step=N, max_new_tokens=LIMIT, minibatches=1, scale='none',
                  mask_truncated=True)
    groups = fixed()
    groups[0].scores[1] = [float('nan')]
    policy = AnswerCollator(tok, model), model, find_head(model), None, judge(model, how)
    set_gains(groups, how, *policy)
    batch, = batches(groups, how, *policy)
    silent = [k for k,r in enumerate(r for g in groups for r in g.rollouts) if k == 1 or not r.stopped]
    assert len(silent) > 1 and (batch['gains'].abs().sum(-1) == 0).nonzero().flatten().tolist() == silent
    losses = answer_losses(model, policy[2], batch, how, {}, policy[-1])
    assert (losses[silent] == 0).all() and (losses != 0).sum() == N*G-len(silent)

@pytest.mark.parametrize('algorithm', ALGORITHMS)
@pytest.mark.parametrize('more', [{}, dict(epochs=2, minibatches=2), dict(beta=.1), dict(entropy_coef=.01)], ids=str)
def test_every_algorithm_runs_and_moves_the_policy(tmp_path, algorithm, more):
    model,tok = start()
    run = rl(model, tok, ROWS, [vowels], algorithm, tmp_path/'run', **QUICK | dict(minibatches=1) | more)
    assert len(run.log) == 4 and all(e['grad_norm'] > 0 for e in run.log)
    first = run.log[0]
    if not more: assert abs(first['ratio']-1) < 1e-5 and first['approx_kl'] < 1e-8 and first['clip_share'] == 0
    if more == dict(beta=.1) and algorithm != 'rloo': assert abs(first['kl']) < 1e-6 < run.log[-1]['kl']
    lines = [json.loads(l) for l in (run.path/'rollouts.jsonl').read_text().splitlines()]
    assert len(lines) == 64 and {*lines[0]} == {'step', 'prompt', 'completion', 'scores', 'advantage'}
    assert (run.adapter/'adapter_model.safetensors').exists()

def test_a_reward_is_learned(tmp_path):
    model,tok = start('full')
    run = rl(model, tok, ROWS, vowels, 'grpo', tmp_path/'run', **QUICK | dict(steps=60, learning_rate=1e-3, group=8))
    rewards = [e['reward'] for e in run.log]
    assert sum(rewards[-10:]) > 2*sum(rewards[:10])

@pytest.mark.parametrize('algorithm', ['grpo', 'ppo'])
def test_no_memory_left(tmp_path, monkeypatch, algorithm):
    "The run says in which stage, what a step needs, and what takes less; it can be resumed"
    from ftkit import memory, rl as module
    model,tok = start()
    data,how = [dict(prompt='Say aaa')]*8,dict(max_new_tokens=6, steps=3, prompts_per_step=2, overwrite=True)
    def full(*args): raise torch.OutOfMemoryError('CUDA out of memory')
    def failed(where):
        monkeypatch.setattr(module, '_capacity', lambda: 2**29 + 2**20)
        monkeypatch.setattr(module, where, full)
        with pytest.raises(FtkitError) as e: rl(model, tok, data, vowels, algorithm, tmp_path/'run', **how)
        monkeypatch.undo()
        return str(e.value)
    said = failed('answer_losses')
    assert 'not enough memory: update' in said and f'lora of rank 4, {algorithm}' in said and 'does not fit' in said
    assert 'not enough memory: sample and score' in failed('collect') and said.endswith('take less')
    monkeypatch.setattr(memory, 'FAMILIES', {})
    assert 'lora of rank' not in (short := failed('answer_losses')) and short.endswith('take less')
    monkeypatch.undo()
    assert len(rl(model, tok, data, vowels, algorithm, tmp_path/'run', **how).log) == 3

def test_dynamic_sampling_replaces_groups_within_a_bound(tmp_path):
    "One question in nine has answers that differ"
    calls = []
    def rare(completions, answer, **_):
        calls.append(len(completions))
        return [len(c)/10 if a == '3' else 1. for c,a in zip(completions, answer)]
    with_,without = (rl(*start(), ROWS, rare, 'grpo', tmp_path/str(n), resample=n, **QUICK) for n in (3, 0))
    mean = lambda run: sum(e['spread'] for e in run.log)/4
    assert mean(with_) > mean(without) and max(calls) == 16 and len(calls) <= 4*4 + 4

KILLED = '''
import os, sys
sys.path.insert(0, sys.argv[2])
os.environ['IN_TEST'] = '1'
from test_rl import *
rl(*start(), ROWS, vowels, sys.argv[3], sys.argv[1], **QUICK | dict(steps=12))
'''

@pytest.mark.parametrize('algorithm', ['grpo', 'rloo', 'ppo'])
def test_killed_and_resumed_equals_unbroken(tmp_path, algorithm):
    options = QUICK | dict(steps=12)
    whole = rl(*start(), ROWS, vowels, algorithm, tmp_path/'whole', **options)
    here = str(os.path.dirname(__file__))
    child = subprocess.Popen([sys.executable, '-c', KILLED, str(tmp_path/'killed'), here, algorithm])
    saved = lambda: list((tmp_path/'killed').glob('checkpoint-*/trainer_state.json'))
    while not saved() and child.poll() is None: time.sleep(.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert len(read_log(tmp_path/'killed')) < 12
    again = rl(*start(), ROWS, vowels, algorithm, tmp_path/'killed', resume=True, **options)
    strip = lambda log: [{k: v for k,v in e.items() if k != 'seconds'} for e in log]
    assert strip(again.log) == strip(whole.log)
    texts = [(r.path/'rollouts.jsonl').read_text() for r in (whole, again)]
    assert texts[0] == texts[1]

def test_another_run_is_not_resumed(tmp_path):
    rl(*start(), ROWS, vowels, 'grpo', tmp_path/'run', **QUICK)
    with pytest.raises(FtkitError, match='already holds'): rl(*start(), ROWS, vowels, 'grpo', tmp_path/'run', **QUICK)
    more = dict(resume=True, **QUICK | dict(steps=9))
    with pytest.raises(FtkitError, match='another options.group: 4, not 8'):
        rl(*start(), ROWS, vowels, 'grpo', tmp_path/'run', **more | dict(group=8))
    model,tok = start()
    with torch.no_grad(): next(p for p in model.parameters() if p.requires_grad).add_(1)
    with pytest.raises(FtkitError, match='load the model anew'):
        rl(model, tok, ROWS, vowels, 'grpo', tmp_path/'run', **more)

def fault(kind):
    def raises(completions, **_): raise KeyError('answer')
    def nan(completions, **_): return [float('nan')]*len(completions)
    def few(completions, **_): return [1.]
    def none(completions, **_): return None
    return dict(raises=raises, nan=nan, few=few, none=none)[kind]

@pytest.mark.parametrize('kind,says', [('raises', 'raises failed: KeyError'), ('nan', 'nan gave nan for answer 0'),
                                       ('few', 'few gave 1 values for 16'), ('none', 'none gave NoneType')])
def test_a_reward_that_fails_is_named(tmp_path, kind, says):
    with pytest.raises(FtkitError, match=says): rl(*start(), ROWS, fault(kind), 'grpo', tmp_path/'run', **QUICK)

def test_answers_that_cannot_be_scored_teach_nothing(tmp_path):
    def one(n): return None if n % 2 else float(n)
    def some(completions, **_): return [one(len(c)) for c in completions]
    run = rl(*start(), ROWS, some, 'grpo', tmp_path/'run', **QUICK)
    lines = [json.loads(l) for l in (run.path/'rollouts.jsonl').read_text().splitlines()]
    unscored = [l for l in lines if l['scores'][0] != l['scores'][0]]
    assert unscored and all(l['advantage'] == 0 for l in unscored)

class Dies(HFEngine):
    def sample(self, *args):
        if self.left == 0: raise ConnectionError('gone')
        self.left -= 1
        return super().sample(*args)

def test_an_engine_that_dies_leaves_a_run_to_resume(tmp_path):
    whole = rl(*start(), ROWS, vowels, 'grpo', tmp_path/'whole', **QUICK)
    model,tok = start()
    engine = Dies(model, tok)
    engine.left = 3
    with pytest.raises(ConnectionError): rl(model, tok, ROWS, vowels, 'grpo', tmp_path/'run', engine, **QUICK)
    again = rl(*start(), ROWS, vowels, 'grpo', tmp_path/'run', resume=True, **QUICK)
    assert [e['reward'] for e in again.log] == [e['reward'] for e in whole.log]

@pytest.mark.parametrize('options,says', [(dict(group=1), 'alone is no better'), (dict(temperature=0.), 'must differ'),
    (dict(steps=0), 'at least 1'), (dict(nonsense=1), 'rl knows'), (dict(loss_type='x'), 'loss_type'),
    (dict(optim='adamw_nothing'), 'adamw_nothing'), (dict(precision='bfloat16'), "precision 'bfloat16' is unknown"),
    (dict(eval_steps=0), 'eval_steps=0'), (dict(top_entropy=2.), 'top_entropy=2'),
    (dict(weights=[1., 2.]), '2 weights'), (dict(engine=object()), 'is no engine'),
    (dict(max_new_tokens=10**6), 'more than the')])
def test_what_cannot_work_is_refused(tmp_path, options, says):
    with pytest.raises(FtkitError, match=says):
        rl(*start(), ROWS, vowels, 'grpo', tmp_path/'run', **QUICK | options)
    assert not (tmp_path/'run').exists()

def test_a_rehearsal_sees_what_stands_in_the_way():
    model,tok = start()
    dull = rehearse(model, tok, ROWS, flat, prompts=4, group=4, max_new_tokens=4)
    assert dull.truncated > .5 and 'max_new_tokens=4' in str(dull) and 'of the groups' in str(dull)
    def worthless(completions, **_): return [0.]*len(completions)
    assert rehearse(model, tok, ROWS, worthless, prompts=4, max_new_tokens=4).findings[0].endswith('looks like')
    def unread(completions, **_): return [None]*len(completions)
    assert 'no reward function' in str(rehearse(model, tok, ROWS, unread, prompts=4, max_new_tokens=4))

@pytest.mark.parametrize('worth', [.1, .3, .7, .9])
def test_nor_does_it_move_where_the_mean_is_rounded(tmp_path, worth):
    model,tok = start()
    before = {n: p.clone() for n,p in model.named_parameters()}
    def equal(completions, **_): return [worth]*len(completions)
    rl(model, tok, ROWS, equal, 'grpo', tmp_path/'run', **QUICK | dict(group=8))
    assert all(torch.equal(p, before[n]) for n,p in model.named_parameters())

def test_a_line_cut_off_by_a_kill_is_no_hindrance(tmp_path):
    options = QUICK | dict(steps=4)
    whole = rl(*start(), ROWS, vowels, 'grpo', tmp_path/'whole', **options)
    rl(*start(), ROWS, vowels, 'grpo', tmp_path/'run', **options | dict(steps=2))
    for name in ('log.jsonl', 'rollouts.jsonl'):
        with (tmp_path/'run'/name).open('a') as f: f.write('{"step": 3, "prom')
    again = rl(*start(), ROWS, vowels, 'grpo', tmp_path/'run', resume=True, **options)
    assert [e['reward'] for e in again.log] == [e['reward'] for e in whole.log]

def test_dropout_is_the_same_after_a_kill(tmp_path):
    from peft import LoraConfig, get_peft_model
    def dropped():
        model,tok = start('full')
        torch.manual_seed(5)
        return get_peft_model(model, LoraConfig(target_modules='all-linear', r=4, lora_dropout=.3)), tok
    whole = rl(*dropped(), ROWS, vowels, 'grpo', tmp_path/'whole', **QUICK)
    rl(*dropped(), ROWS, vowels, 'grpo', tmp_path/'run', **QUICK | dict(steps=2))
    torch.rand(100)
    again = rl(*dropped(), ROWS, vowels, 'grpo', tmp_path/'run', resume=True, **QUICK)
    assert [e['grad_norm'] for e in again.log] == [e['grad_norm'] for e in whole.log]

@pytest.mark.parametrize('changed', ['data', 'rewards'])
def test_other_data_or_rewards_are_not_resumed(tmp_path, changed):
    def vowels2(completions, **_): return vowels(completions)
    rl(*start(), ROWS, vowels, 'grpo', tmp_path/'run', **QUICK)
    data,reward = (ROWS[:40], vowels) if changed == 'data' else (ROWS, vowels2)
    more = QUICK | dict(steps=6, save_steps=1, eval_steps=3)
    with pytest.raises(FtkitError, match=f'another {changed}'):
        rl(*start(), data, reward, 'grpo', tmp_path/'run', resume=True, **more)
    assert len(rl(*start(), ROWS, vowels, 'grpo', tmp_path/'run', resume=True, **more).log) == 6

@pytest.mark.parametrize('kind', ['full', 'trained'])
@pytest.mark.parametrize('algorithm', ['grpo', 'rloo'])
def test_the_reference_is_where_the_policy_began(tmp_path, kind, algorithm):
    "Of a whole model, and of an adapter that has been trained before: no distance in the first step, one in the last"
    model,tok = start('full' if kind == 'full' else 'lora')
    if kind == 'trained':
        with torch.no_grad():
            for n,p in model.named_parameters():
                if 'lora_B' in n: p.normal_(std=.1)
    run = rl(model, tok, ROWS, vowels, algorithm, tmp_path/'run', beta=.1, **QUICK)
    if algorithm == 'grpo': assert abs(run.log[0]['kl']) < 1e-6 < run.log[-1]['kl']
    else: assert run.log[0]['grad_norm'] > 0

def test_no_limit_of_the_gradient(tmp_path):
    free,tight = (rl(*start(), ROWS, vowels, 'grpo', tmp_path/str(n), max_grad_norm=n, **QUICK | dict(optim='sgd'))
                  for n in (0., 1e9))
    assert [e['grad_norm'] for e in free.log] == [e['grad_norm'] for e in tight.log]

def test_rows_that_do_not_fit_together_are_refused(tmp_path):
    odd = [*ROWS, dict(prompt='?')]
    for data,says in (([], 'no rows'), ([dict(question='?')], 'row 1 has no prompt'), (dict(train=ROWS), 'have parts'),
                      ([dict(prompt='')], 'row 1 has no prompt'), (odd, 'row 82 and row 1 differ in columns: answer')):
        with pytest.raises(FtkitError, match=says): rl(*start(), data, vowels, 'grpo', tmp_path/'run', **QUICK)
        with pytest.raises(FtkitError, match=says): rehearse(*start(), data, vowels)

def test_two_rewards_of_one_name_and_numbers_of_any_kind(tmp_path):
    import numpy as np
    def a(completions, **_): return torch.tensor([float(len(c)) for c in completions])
    def b(completions, **_): return np.array([len(c) > 3 for c in completions])
    b.__name__ = 'a'
    evaluate = lambda m: dict(eval_a=torch.tensor(1.5), eval_b=np.float32(2.5))
    run = rl(*start(), ROWS, [a, b], 'grpo', tmp_path/'run', evaluate=evaluate, weights=[.1, 1.], **QUICK)
    assert {'rewards/a 1', 'rewards/a 2'} <= {*run.log[1]} and run.log[0]['eval_a'] == 1.5

CRITIC = dict(baseline='critic', scale='batch', loss_type='dapo')

@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
@pytest.mark.parametrize('more', [{}, dict(beta=.1), dict(epochs=2), CRITIC], ids=str)
def test_half_the_bits(tmp_path, precision, more):
    model,tok = start()
    run = rl(model, tok, ROWS, vowels, 'grpo', tmp_path/'run', precision=precision, **QUICK | more)
    assert all(e['grad_norm'] > 0 for e in run.log) and abs(run.log[0]['ratio']-1) < .02


# what a review found

def test_a_price_in_the_loss_is_not_in_the_reward_as_well():
    "With a critic, too, it is paid once"
    from ftkit.reference import Reference
    model,tok = start()
    began = Reference(model, 'adapter')
    for n,p in model.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(p, std=.3)
    def held(**more):
        how = choices('ppo', group=G, prompts_per_step=N, max_new_tokens=LIMIT, minibatches=1, scale='none', **more)
        policy = AnswerCollator(tok, model), model, find_head(model), began, judge(model, how)
        set_gains(groups := fixed(), how, *policy)
        batch, = batches(groups, how, *policy)
        return batch['gains'], answer_losses(model, policy[2], batch, how, {}, policy[-1])
    free,in_loss,in_reward = held(),held(beta=.5, kl_in_reward=False),held(beta=.5)
    torch.testing.assert_close(free[0], in_loss[0])
    assert (free[0]-in_reward[0]).abs().max() > .01 and (free[1]-in_loss[1]).abs().max() > .01

@pytest.mark.parametrize('rewards', [vowels, lambda completions, **_: [None]*len(completions)])
def test_a_step_in_which_no_token_is_trained_moves_nothing(tmp_path, rewards):
    more = dict(mask_truncated=rewards is vowels, max_new_tokens=1, minibatches=1)
    run = rl(*start(), ROWS, rewards, 'ppo', tmp_path/'run', **QUICK | more)
    assert all(e['grad_norm'] == 0 for e in run.log)

@pytest.mark.parametrize('options,says', [
    (dict(algorithm='ppo', aggregation='normalize_then_sum'), 'a critic goes with'),
    (dict(algorithm='ppo', scale='group', group=4), 'a critic judges tokens'),
    (dict(algorithm='reinforce', group=1, scale='group'), 'no deviation'),
    (dict(algorithm='reinforce', group=1, resample=2), 'compared with no other'),
    (dict(engine_timeout=5.), 'engine_timeout is for')])
def test_choices_that_do_not_go_together_are_refused(tmp_path, options, says):
    with pytest.raises(FtkitError, match=says): rl(
        *start(), ROWS, vowels, out=tmp_path/'run', **QUICK | dict(algorithm='grpo') | options)

def test_an_infinite_reward_is_named(tmp_path):
    def endless(completions, **_): return [float('inf')]*len(completions)
    for algorithm in ('grpo', 'ppo'):
        with pytest.raises(FtkitError, match='infinite|inf'): rl(
            *start(), ROWS, endless, algorithm, tmp_path/algorithm, **QUICK)

def test_a_rehearsal_of_lone_answers_compares_them_all():
    assert rehearse(*start(), ROWS, vowels, 'ppo', prompts=8, max_new_tokens=6).spread == 1
    assert rehearse(*start(), ROWS, flat, 'ppo', prompts=8, max_new_tokens=6).spread == 0
