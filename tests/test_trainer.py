"The trainer when things go wrong: losses that are not finite, early stops, kills; and records, precision, real pairs"
import os, re, signal, subprocess, sys, time
import pytest, torch
from ftkit.core import FtkitError
from ftkit.objectives import OBJECTIVES
from ftkit.train import last_checkpoint, read_log, train
from test_objectives import ANSWERED, data_for, pairs, run, start

def poisoned(objective, at=3):
    "The objective, whose loss is not a number in the third training batch"
    from dataclasses import replace
    obj,seen = OBJECTIVES[objective],[]
    def loss(model, head, batch, **options):
        found = obj.loss(model, head, batch, **options)
        seen.append(model.training)
        return found._replace(losses=found.losses*float('nan')) if sum(seen) == at else found
    return replace(obj, loss=loss)

@pytest.mark.parametrize('objective', ['sft', 'dpo', 'kto'])
def test_a_loss_that_is_no_number_ends_the_run_and_leaves_its_batch(tmp_path, objective, monkeypatch):
    from safetensors.torch import load_file
    monkeypatch.setitem(OBJECTIVES, objective, poisoned(objective))
    with pytest.raises(FtkitError, match='not finite at step 3'): run(tmp_path, objective, 'lora', max_steps=6)
    batch = load_file(tmp_path/'run'/'bad_batch.safetensors')
    assert batch['input_ids' if objective == 'sft' else 'inputs.input_ids'].numel()
    assert len([e for e in read_log(tmp_path/'run') if 'loss' in e]) == 2
    monkeypatch.undo()
    run(tmp_path, objective, 'lora', max_steps=2, overwrite=True)
    assert not (tmp_path/'run'/'bad_batch.safetensors').exists()

def test_patience_stops_early_and_keeps_the_best(tmp_path):
    "Held-out pairs the wrong way around, which only get worse"
    held = [p | dict(chosen=p['rejected'], rejected=p['chosen']) for p in pairs(24)]
    found = run(tmp_path, 'dpo', 'lora', max_steps=20, learning_rate=5e-3, warmup_steps=0, patience=2, eval_data=held,
                save_strategy='steps', eval_steps=2, save_steps=2)
    steps = [e['step'] for e in found.log if 'eval_loss' in e]
    losses = {e['step']: e['eval_loss'] for e in found.log if 'eval_loss' in e}
    best = min((s for s in steps if s), key=losses.get)
    assert steps[-1] < 20 and found.record['best_metric'] == losses[best]
    assert found.record['best_checkpoint'].endswith(f'checkpoint-{best}')
    with pytest.raises(FtkitError, match='patience needs eval_data'): run(tmp_path, 'dpo', patience=1, name='none')

def test_the_record_says_what_a_run_was_made_of(tmp_path):
    found = run(tmp_path, 'dpo', 'lora', max_steps=2, beta=.2)
    record = found.record
    assert record['options']['beta'] == .2 and record['reference'] == 'adapter' and record['packing'] == 'shared'
    assert record['step'] == 2 and record['tokens'] > 0 and record['peak_memory'] > 2**20
    assert record['versions'].keys() >= {'torch', 'transformers', 'peft'} and record['data']['rows'] == 160
    again = run(tmp_path, 'dpo', 'lora', max_steps=2, name='again').record
    other = run(tmp_path, 'dpo', 'lora', max_steps=2, name='other', data=pairs(80)).record
    assert again['data']['hash'] == record['data']['hash'] != other['data']['hash']

def test_a_tracker_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr('ftkit.train.find_spec', lambda name: None)
    with pytest.raises(FtkitError, match="report_to='comet_ml': it is not installed: pip install comet-ml"):
        run(tmp_path, 'dpo', report_to='comet_ml')
    assert not (tmp_path/'run').exists()

@pytest.mark.parametrize('optim', ['adamw_torch_fused', 'adamw_8bit', 'paged_adamw_8bit', 'adafactor'])
def test_optimizers(tmp_path, optim):
    if '8bit' in optim: pytest.importorskip('bitsandbytes')
    log = run(tmp_path, 'dpo', 'lora', max_steps=15, learning_rate=5e-3, optim=optim).log
    losses = [e['loss'] for e in log if 'loss' in e]
    assert sum(losses[-3:])/3 < losses[0]

@pytest.mark.parametrize('objective', ANSWERED)
def test_bf16(tmp_path, objective):
    "Autocast on a CPU: the same losses, but for the rounding of 8 bits"
    whole,half = (run(tmp_path, objective, 'lora', max_steps=4, precision=p, name=p).log for p in ('fp32', 'bf16'))
    for a,b in zip(whole, half):
        if 'loss' in a: assert abs(a['loss']-b['loss']) < .05*max(1, a['loss'])

KILLED = '''
import os, sys
sys.path.insert(0, sys.argv[3])
os.environ['IN_TEST'] = '1'
from test_objectives import data_for, run
from pathlib import Path
run(Path(sys.argv[1]), sys.argv[2], 'lora', max_steps=30, save_strategy='steps', save_steps=5)
'''

@pytest.mark.parametrize('objective', ANSWERED)
def test_killed_and_resumed_equals_unbroken(tmp_path, objective):
    settings = dict(max_steps=30, save_strategy='steps', save_steps=5)
    unbroken = run(tmp_path, objective, 'lora', name='unbroken', **settings)
    (tmp_path/'run.py').write_text(KILLED)
    here = os.path.dirname(__file__)
    p = subprocess.Popen([sys.executable, tmp_path/'run.py', tmp_path, objective, here], stderr=subprocess.DEVNULL,
                         env=os.environ | dict(OMP_NUM_THREADS='1'))
    broken = tmp_path/'run'
    def steps(): return len([e for e in read_log(broken) if 'loss' in e]) if (broken/'log.jsonl').exists() else 0
    while p.poll() is None and steps() < 12: time.sleep(.005)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert p.returncode == -signal.SIGKILL, 'it was killed, and not done before'
    assert last_checkpoint(broken) and not (broken/'adapter').exists()
    resumed = run(tmp_path, objective, 'lora', resume=True, **settings)
    a,b = ([e['loss'] for e in r.log if 'loss' in e] for r in (unbroken, resumed))
    assert len(a) == len(b) == 30 and a == b

REAL = dict(dpo=('rasbt_preference.jsonl', 'sharegpt_dpo_en.jsonl', 'hh_harmless_base.jsonl'), kto=('kto_en.jsonl',))
FILES = [(objective, file) for objective,files in REAL.items() for file in files]

@pytest.mark.parametrize('objective,file', FILES, ids=[f for _,f in FILES])
def test_real_answers(shared, tmp_path, objective, file, capsys, recwarn):
    "A few steps on a real model; rows in = rows out and rows left out, each with a reason"
    from ftkit.answers import cut_answers, encode_answers
    from ftkit.formats import load
    from ftkit.models import load_model, load_tokenizer
    folder = shared/'models'/'stories260K'
    tok = load_tokenizer(folder)
    rows = load(shared/'datasets'/file, on_error='skip')
    ds = encode_answers(tok, rows, on_error='skip')
    kept,cut = cut_answers(ds, 384, 'right')
    assert cut.rows == len(ds) == cut.kept + cut.equal + cut.empty and len(kept) == cut.kept
    print(f'{file}: {len(rows)} rows, {cut}')
    recwarn.clear()
    found = train(load_model(folder, tok), tok, kept, objective, out=tmp_path/'run', max_steps=3,
                  per_device_train_batch_size=4)
    assert all(torch.tensor(e['loss']).isfinite() for e in found.log if 'loss' in e)
    assert [str(w.message) for w in recwarn if not issubclass(w.category, DeprecationWarning)] == []


@pytest.mark.parametrize('objective', ['sft', 'dpo'])
def test_no_memory_left(tmp_path, monkeypatch, objective):
    "The run says what a step needs, and what would make it fit; where that is not counted, what helps in any case"
    from transformers import TrainerCallback
    from ftkit import memory, train as module
    class Full(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): raise torch.OutOfMemoryError('CUDA out of memory')
    def failed(adapter=None, **more):
        with pytest.raises(FtkitError) as e: run(tmp_path, objective, adapter, max_steps=2, callbacks=[Full()],
                                                 overwrite=True, **more)
        return str(e.value)
    monkeypatch.setattr(module, '_capacity', lambda: 2**29 + 2**20)
    said = failed()
    assert 'not enough memory for' in said and f'full, {objective}' in said and 'does not fit' in said
    assert 'gradient checkpointing' in said or 'rows of' in said
    assert 'lora of rank' in failed('lora')
    if objective == 'sft': assert 'with masks' in failed(packing=True, max_length=64)
    monkeypatch.setattr(memory, 'FAMILIES', {})
    assert 'gradient_checkpointing=True' in failed()

def test_the_first_steps_correct_what_was_counted(tmp_path, monkeypatch, recwarn):
    "And tell whether the longest rows will fit: in a stub's bytes, as there is no GPU"
    from ftkit import memory, train as module
    def said(text): return [dict(role='user', content='Say it.'), dict(role='assistant', content=text)]
    rows = [dict(messages=said('yes '*(1 + 60*(k == 7)))) for k in range(64)]
    def found(measured, capacity=2**34, objective='sft', **more):
        monkeypatch.setattr(module, '_in_use', lambda: measured)
        monkeypatch.setattr(module, '_capacity', lambda: capacity)
        recwarn.clear()
        record = run(tmp_path, objective, max_steps=3, overwrite=True, per_device_train_batch_size=2, **more).record
        return record.get('memory'), [str(w.message) for w in recwarn if 'the longest' in str(w.message)]
    assert found(None, data=rows) == (None, [])
    first,said = found(2**28, data=rows)
    assert first['measured'] == 2**28 < first['longest'] and said == []
    _,(said,) = found(2**28, 2**29 + 2**28 + 2**20, data=rows)
    assert 'tokens, the longest, will not fit' in said and 'does not fit' in said
    right,_ = found(first['counted'], data=rows) # what was counted was right: nothing to correct
    long = int(re.match(r'rows of (\d+)', said)[1])
    config,options = start()[0].config,dict(dtype='fp32', batch=2, optim='adamw_torch_fused', packing=True)
    assert right['longest'] == memory.estimate(config, 'full', long, **options).allocated > right['counted']
    most,_ = found(2**28, data=rows, eval_data=rows[:8], eval_on_start=True, eval_strategy='steps', eval_steps=1)
    assert most == first # which knows nothing of evaluations
    once,_ = found(2**28, data=rows, gradient_accumulation_steps=2)
    assert once['counted'] > first['counted'] # the gradients of the batch before
    assert found(2**28, objective='dpo')[0]['longest'] == pytest.approx(2**28, abs=1000)
    monkeypatch.setattr(memory, 'FAMILIES', {})
    assert found(2**28, data=rows) == (dict(measured=2**28), [])

def test_twice_the_rows_are_evaluated():
    "Of a step, where nothing else is said; what is no number is left to `TrainingArguments`"
    from ftkit.train import _settings
    def rows(**options): return _settings('out', 'fp32', options, 1e-3, True, True, None)['per_device_eval_batch_size']
    assert rows() == 16 and rows(per_device_train_batch_size=3) == 6 and rows(per_device_eval_batch_size=5) == 5
    assert rows(per_device_train_batch_size=None) == rows(per_device_train_batch_size='8') == 16

def test_which_of_both_had_no_memory_left():
    "From the shape of what was running, a step's and an evaluation's, with twice its rows: padded, and several in one"
    from ftkit.train import _as_in_a_step as both
    assert both(4, 600, 2, True) == (4, 600, 8) and both(8, 600, 2, False) == (4, 600, 8)
    assert both(1, 2048, 2, True) == (1, 2048, 2) and both(1, 4096, 2, False) == (1, 2048, 2)
    assert both(3, 512, 2, False) == (2, 512, 3) and both(1, 3, 32, False) == (1, 2, 32)

@pytest.mark.parametrize('objective', ['sft', 'dpo'])
def test_an_evaluation_that_ran_out(tmp_path, monkeypatch, objective):
    "What a step is, and what the evaluation, whichever of them it was"
    from types import SimpleNamespace
    from ftkit.tiny import tiny
    from ftkit.train import _setting
    from transformers import TrainingArguments
    model = tiny()[1]
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, per_device_eval_batch_size=8, use_cpu=True)
    def said(shape, training): return {k: _setting(SimpleNamespace(
        accelerator=SimpleNamespace(unwrap_model=lambda m: m.train(training)), model=model, args=args, shape=shape,
        eval_dataset=[1], train_dataset=None, how=None), objective)[k] for k in ('batch', 'length', 'evaluation')}
    rows = (4, 8) if objective == 'sft' else (8, 16) # of pairs, whose answers lie apart in so narrow a model
    step = dict(batch=4, length=600, evaluation=8)
    assert said((rows[0], 600), True) == step and said((rows[1], 600), False) == step

def test_what_a_run_is_counted_as(tmp_path, monkeypatch):
    "Its reference, its adapter, the GPUs it shares, masks; where it should have fitted, what helps in any case"
    from types import SimpleNamespace
    from ftkit import train as module
    seen,why = [],module._why_no_memory
    def look(trainer, *args):
        monkeypatch.setattr(trainer.args.__class__, 'world_size', 2)
        several = module._setting(trainer, *args)
        monkeypatch.undo()
        seen.append((module._setting(trainer, *args), several, why(trainer, *args)))
        return 'looked'
    def setting(objective, adapter=None, **more):
        class Full(TrainerCallback):
            def on_step_end(self, *args, **kwargs): raise torch.OutOfMemoryError('CUDA out of memory')
        monkeypatch.setattr(module, '_why_no_memory', look)
        monkeypatch.setattr(module, '_capacity', lambda: 2**36)
        with pytest.raises(FtkitError, match='looked'): run(tmp_path, objective, adapter, max_steps=2, overwrite=True,
                                                            callbacks=[Full()], **more)
        return seen[-1]
    from transformers import TrainerCallback
    s,several,said = setting('dpo')
    assert s['reference'] == 'precomputed' and not re.search(r'reference \d', said) and said.endswith('takes less')
    assert (s['gpus'], several['gpus'], several['sharding']) == (1, 2, 'ddp')
    assert setting('kto', 'lora')[0]['reference'] == 'adapter'
    assert setting('sft', per_device_train_batch_size=1)[0]['packing'] is False and setting('sft')[0]['packing']
    adapter = SimpleNamespace(r=4, target_modules={'a.q_proj'}, use_dora=True)
    assert module._of_adapter(adapter) == dict(lora=dict(r=4, target_modules=['q_proj'], use_dora=True))

@pytest.mark.parametrize('objective', ['dpo', 'kto', 'orpo', 'reward'])
def test_the_length_of_answers(objective):
    "Is told from the tokens of a batch, as answers are laid"
    from types import SimpleNamespace
    from ftkit.answers import AnswerCollator
    from ftkit.tiny import tiny
    from ftkit.train import _half_answers, _shape
    model = tiny()[1]
    answers = dict(completion_ids=[6]*40, KL_completion_ids=[6]*40, label=True) if objective == 'kto' else dict(
        chosen_ids=[6]*40, rejected_ids=[7]*40)
    for n in (1, 3, 8):
        batch = AnswerCollator(SimpleNamespace(pad_token_id=0), model, 'shared')([dict(prompt_ids=[5]*40) | answers]*n)
        rows,width = _shape(batch)
        assert abs(_half_answers(objective, n, rows*width, model.config) - 80) <= 1

@pytest.mark.parametrize('adapter', [None, 'lora'])
def test_what_a_run_takes_on_the_disk(tmp_path, adapter):
    "Files of weights and of the optimizer, but for the names in them"
    from ftkit.memory import stored
    from ftkit.tiny import tiny
    found = run(tmp_path, 'sft', adapter, max_steps=2, save_strategy='steps', save_steps=2)
    config,lora = tiny()[1].config,dict(r=4) if adapter else {}
    said = stored(config, adapter or 'full', optim='adamw_torch', checkpoints=1, **lora)
    def size(folder): return sum(f.stat().st_size for f in folder.iterdir() if f.name == 'optimizer.pt'
                                 or f.suffix == '.safetensors')
    there = size(next(found.path.glob('checkpoint-*')))
    assert 0 <= there - said['checkpoints'] < 60_000 and 0 <= size(found.adapter) - said['result'] < 10_000

def test_fsdp_is_refused(tmp_path):
    "Our loss has not been shown to be right there"
    model,tok = start('sft')
    model.__class__ = type(f'FSDP{type(model).__name__}', (type(model),), {}) # as fully_shard does
    with pytest.raises(FtkitError, match='FSDP'): train(model, tok, data_for('sft'), 'sft', tmp_path/'run', max_steps=1)

@pytest.mark.parametrize('engine', ['ftkit', 'trl'])
def test_fsdp_of_accelerate_is_refused_before_the_run(tmp_path, monkeypatch, engine):
    "TRL's steps would pass, and its end not be written: the first process alone has a part of the weights"
    from accelerate import Accelerator, DistributedType
    from ftkit import train as module
    make = module._maker
    def shared(*args):
        def made(**kwargs):
            trainer = make(*args)(**kwargs)
            monkeypatch.setattr(Accelerator, 'distributed_type', property(lambda self: DistributedType.FSDP))
            return trainer
        return made
    monkeypatch.setattr(module, '_maker', shared)
    model,tok = start('sft')
    with pytest.raises(FtkitError, match='saved by its first process alone'):
        train(model, tok, data_for('sft'), 'sft', tmp_path/'run', max_steps=1, engine=engine)
    assert not (tmp_path/'run'/'run.json').exists()

def test_a_plain_head_of_fsdp():
    "Is one; a head with an adapter, whose class is called the same, is not"
    from peft.tuners.lora import Linear
    from ftkit.logps import _is_shared
    swapped = lambda kind: object.__new__(type('FSDPLinear', (kind,), {}))
    assert _is_shared(swapped(torch.nn.Linear)) and not _is_shared(swapped(Linear))
    assert not _is_shared(torch.nn.Linear(2, 2))
