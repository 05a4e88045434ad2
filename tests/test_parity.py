"Against TRL: the same data, seed and model must cost the same at every step"
from dataclasses import replace
from functools import partial
from pathlib import Path
import pytest, torch
from ftkit.chat import set_template
from ftkit.tasks import rows
from ftkit.tiny import tiny

STEPS = 20

def settings(out):
    return dict(output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=8, learning_rate=1e-2,
                lr_scheduler_type='linear', warmup_steps=5, weight_decay=0., logging_steps=1, seed=0, use_cpu=True,
                bf16=False, report_to='none', save_strategy='no', disable_tqdm=True)

def losses(log, name='loss'): return torch.tensor([entry[name] for entry in log if 'loss' in entry])

def chat_model():
    tok,model = tiny()
    set_template(tok)
    return tok, model

def trl_losses(data, out, name='loss', **extra):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    tok,model = chat_model()
    config = SFTConfig(**{**settings(out), **extra}, assistant_only_loss=True, max_length=None, packing=False,
                       gradient_checkpointing=False)
    ds = Dataset.from_list([dict(messages=r['messages']) for r in data])
    trainer = SFTTrainer(model, config, train_dataset=ds, processing_class=tok)
    trainer.train()
    return losses(trainer.state.log_history, name)

def ftkit_losses(data, out, name='loss', **extra):
    from ftkit.train import train
    tok,model = chat_model()
    options = {k:v for k,v in settings(out).items() if k != 'output_dir'}
    return losses(train(model, tok, data, out=out, **{**options, **extra}).log, name)

FOUR_TIMES_TWO = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)

KINDS = {'batch of 8': {}, '4 times 2': FOUR_TIMES_TWO, 'dft': dict(loss_type='dft'),
         'smoothed': dict(label_smoothing_factor=.1)}

@pytest.mark.parametrize('extra', KINDS.values(), ids=KINDS.keys())
def test_sft_equals_trl_at_every_step(tmp_path, extra):
    data = rows(200)
    ours,theirs = ftkit_losses(data, tmp_path/'ours', **extra),trl_losses(data, tmp_path/'theirs', **extra)
    assert len(ours) == STEPS
    print(f'largest difference over {STEPS} steps: {(ours-theirs).abs().max():.1e}')
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (ours[0] > 5 and ours[-1] < ours[0]-1) or 'loss_type' in extra, 'a run that learns nothing compares nothing'

def test_token_accuracy_equals_trls(tmp_path):
    data,name = rows(200),'mean_token_accuracy'
    ours,theirs = ftkit_losses(data, tmp_path/'ours', name),trl_losses(data, tmp_path/'theirs', name)
    assert ours[-1] > ours[0]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)

def test_a_different_mask_is_noticed(tmp_path, monkeypatch):
    from ftkit.mask import encode_dataset
    from ftkit.train import OBJECTIVES
    sft = OBJECTIVES['sft']
    everything = partial(sft.prepare, encode=partial(encode_dataset, train_on='all'))
    monkeypatch.setitem(OBJECTIVES, 'sft', replace(sft, prepare=everything))
    data = rows(200)
    assert (ftkit_losses(data, tmp_path/'ours')-trl_losses(data, tmp_path/'theirs')).abs().max() > 1e-2

@pytest.mark.parametrize('name', ['qwen2_5_training', 'llama3_training', 'qwen3_training'])
def test_labels_equal_the_templates_own_marks(shared, name):
    "Spans found by rendering against the masks transformers takes from {% generation %} marks"
    from ftkit.mask import encode
    tok,_ = tiny()
    tok.chat_template = (shared/'templates'/'trl'/f'{name}.jinja').read_text()
    turns = ('user', '2 + 2?'), ('assistant', 'It is 4.'), ('user', '3 + 3?'), ('assistant', '6')
    chat = [dict(role=role, content=content) for role,content in turns]
    marks = tok.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    ours = encode(tok, chat)
    assert ours['input_ids'] == list(marks['input_ids'])
    # equal but for white space after the end of a turn, which we do not train
    def trained(mask): return ''.join(tok.decode([i for i,m in zip(ours['input_ids'], mask) if m]).split())
    assert trained([label != -100 for label in ours['labels']]) == trained(marks['assistant_masks'])

ACROSS = '''
import os, sys
from ftkit.chat import set_template
from ftkit.tiny import tiny
from ftkit.train import train
os.environ['IN_TEST'] = '1'
ids,found = [[5+i, 6, 7, 8+i] + [9]*(i%3) for i in range(8)],{}
for kind in ('plain', 'weighted'):
    tok,model = tiny()
    set_template(tok)
    data = [dict(input_ids=row, labels=row) for row in ids]
    if kind == 'weighted': data = [r | dict(weights=[.5+.1*i]*len(r['labels'])) for i,r in enumerate(data)]
    size = 8//int(os.environ.get('WORLD_SIZE', 1))
    run = train(model, tok, data, out=f'{sys.argv[1]}/{kind}', max_steps=1, per_device_train_batch_size=size)
    found[kind] = [f'{run.log[0][k]:.6f}' for k in ('loss', 'grad_norm', 'mean_token_accuracy')]
from test_objectives import pairs, start
for objective in ('dpo', 'reward'):
    run = train(*start(objective), pairs(16), objective, out=f'{sys.argv[1]}/{objective}', max_steps=2,
                learning_rate=1e-3, warmup_steps=0, eval_data=pairs(13), per_device_train_batch_size=size,
                per_device_eval_batch_size=4)
    names = ('loss', 'grad_norm'), ('eval_loss',)
    found[objective] = [f'{e[k]:.5f}' for e in run.log for some in names for k in some if k in e]
    found[objective] += [run.record['tokens'], len(run.log)]
open(f'{sys.argv[1]}/found{os.environ.get("RANK", "")}', 'w').write(repr(found))
'''

def test_two_processes_equal_one(tmp_path):
    "Rows of unlike length and weight, pairs, held-out pairs that do not come out even: the same, in one folder"
    import os, subprocess, sys
    (tmp_path/'run.py').write_text(f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})' + ACROSS)
    def found(*launcher, ranks=('',)):
        out = subprocess.run([sys.executable, *launcher, tmp_path/'run.py', tmp_path/str(len(launcher))],
                             text=True, capture_output=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
        assert out.returncode == 0, out.stderr[-2000:]
        return [(tmp_path/str(len(launcher))/f'found{r}').read_text() for r in ranks]
    alone = found()
    assert all(kind in alone[0] for kind in ('plain', 'weighted', 'dpo', 'reward'))
    two = found('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', ranks='01')
    assert two == alone*2
