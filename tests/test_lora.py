"LoRA written out equals PEFT: outputs, gradients, training, folders, counts"
import json
import pytest, torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from ftkit.core import FtkitError
from ftkit.lora import (add_lora, adapter_rows, combine, count_lora, load_lora, lora_layers, lora_plus,
                        lora_state_dict, merge_lora, save_lora, set_adapter)

IDS = torch.randint(90, (3, 12), generator=torch.Generator().manual_seed(0))
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
EVERYWHERE = ['q_proj', 'v_proj', 'o_proj', 'down_proj', 'embed_tokens', 'lm_head']

def llama(tied=False, dtype=torch.float32):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied, attention_bias=True)).to(dtype)

def pair(tied=False, targets=EVERYWHERE, r=4, **kinds):
    "(ours, PEFT's) with the same random adapter of r=4 and alpha=8"
    names = dict(rslora='use_rslora', dora='use_dora', tokens='trainable_token_indices')
    options = {names[k]: v for k,v in kinds.items()}
    if 'tokens' in kinds: options['trainable_token_indices'] = {'embed_tokens': kinds['tokens'],
                                                               **({} if tied else {'lm_head': kinds['tokens']})}
    config = LoraConfig(r=r, lora_alpha=8, target_modules=targets, task_type='CAUSAL_LM', **options)
    peft = get_peft_model(llama(tied), config)
    ours = add_lora(llama(tied), r, 8, targets, **kinds)
    g = torch.Generator().manual_seed(1)
    for n,t in lora_state_dict(ours).items():
        noise = torch.randn(t.shape, generator=g)*.1
        t.copy_(t*(1+noise) if 'magnitude' in n else noise)
    load_into_peft(peft, lora_state_dict(ours))
    return ours.train(), peft.train()

def load_into_peft(peft, weights):
    from peft import set_peft_model_state_dict
    assert not set_peft_model_state_dict(peft, weights).unexpected_keys

def peft_gradients(peft):
    short = lambda n: n.replace('.default', '').replace('lora_magnitude_vector.weight', 'lora_magnitude_vector')
    return {short(n): p.grad for n,p in peft.named_parameters() if p.requires_grad}

def our_gradients(ours):
    grads = {}
    for name,layer in lora_layers(ours).items():
        for n,p in layer.adapters['default'].named_parameters():
            n = n.replace('lora_', 'lora_embedding_') if n[-1] in 'AB' and 'Embedding' in type(layer).__name__ else n
            n = n+'.weight' if n in ('lora_A', 'lora_B') else n
            n = 'token_adapter.'+n if n == 'trainable_tokens_delta' else n
            grads[f'base_model.model.{name}.{n}'] = p.grad
    return grads

KINDS = [dict(), dict(rslora=True), dict(dora=True)]

@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('kinds', KINDS, ids=str)
def test_outputs_gradients_and_ten_steps_equal_peft(kinds, tied):
    ours,peft = pair(tied, **kinds)
    torch.testing.assert_close(ours(IDS).logits, peft(IDS).logits, atol=1e-6, rtol=0)
    for m in (ours, peft): m(IDS, labels=IDS).loss.backward()
    a,b = our_gradients(ours),peft_gradients(peft)
    assert a.keys() == b.keys() and len(a) == 2*10 + 10*('dora' in kinds)
    for n in a: torch.testing.assert_close(a[n], b[n], atol=1e-6, rtol=0, msg=n)
    losses = []
    for m in (ours, peft):
        m.zero_grad()
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=.02, momentum=.9)
        losses.append([step(m, optimizer) for _ in range(10)])
    torch.testing.assert_close(*map(torch.tensor, losses), atol=1e-6, rtol=0)
    assert losses[0][-1] < losses[0][0] - .02

def step(model, optimizer):
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()

@pytest.mark.parametrize('tied', [False, True])
def test_rows_of_new_tokens_equal_peft(tied, tmp_path):
    ours,peft = pair(tied, ['q_proj'], tokens=[3, 7])
    torch.testing.assert_close(ours(IDS).logits, peft(IDS).logits, atol=1e-6, rtol=0)
    for m in (ours, peft): m(IDS, labels=IDS).loss.backward()
    a,b = our_gradients(ours),peft_gradients(peft)
    for n in b: torch.testing.assert_close(a[n], b[n], atol=1e-6, rtol=0, msg=n)
    save_lora(ours, tmp_path)
    again = PeftModel.from_pretrained(llama(tied), tmp_path)
    torch.testing.assert_close(again(IDS).logits, ours(IDS).logits, atol=1e-6, rtol=0)
    logits = ours(IDS).logits
    merged = merge_lora(ours)
    torch.testing.assert_close(merged(IDS).logits, logits, atol=1e-6, rtol=0)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied == merged.config.tie_word_embeddings

@pytest.mark.parametrize('kinds', KINDS, ids=str)
def test_folders_go_both_ways(kinds, tmp_path):
    ours,peft = pair(**kinds)
    save_lora(ours, tmp_path/'ours')
    peft.save_pretrained(tmp_path/'peft', save_embedding_layers=False)
    in_peft = PeftModel.from_pretrained(llama(), tmp_path/'ours').eval()
    in_ours = load_lora(llama(), tmp_path/'peft').eval()
    assert torch.equal(in_peft(IDS).logits, peft.eval()(IDS).logits)
    assert torch.equal(in_ours(IDS).logits, ours.eval()(IDS).logits)
    assert torch.equal(load_lora(llama(), tmp_path/'ours')(IDS).logits, ours(IDS).logits)

@pytest.mark.parametrize('targets', ['all-linear', r'.*layers\.1.*\.(q|up)_proj', ['layers.0.mlp.up_proj', 'k_proj']])
def test_targets_mean_what_they_mean_to_peft(targets):
    ours = add_lora(llama(), 2, targets=targets)
    peft = get_peft_model(llama(), LoraConfig(r=2, target_modules=targets, task_type='CAUSAL_LM'))
    theirs = {n.removeprefix('base_model.model.') for n,m in peft.named_modules()
              if hasattr(m, 'lora_A') and len(m.lora_A)}
    assert {*lora_layers(ours)} == theirs

@pytest.mark.parametrize('rslora', [False, True])
def test_pissa_equals_peft_and_fits_the_original(rslora, tmp_path):
    model = llama()
    before,weights = model(IDS).logits,{n: p.detach().clone() for n,p in model.named_parameters()}
    ours = add_lora(model, 4, 8, ['q_proj', 'up_proj'], rslora=rslora, init='pissa')
    peft = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, target_modules=['q_proj', 'up_proj'],
                                              use_rslora=rslora, init_lora_weights='pissa', task_type='CAUSAL_LM'))
    for name,layer in lora_layers(ours).items():
        other = peft.base_model.model.get_submodule(name)
        change,theirs = layer.adapters['default'].product(),other.get_delta_weight('default')
        torch.testing.assert_close(change, theirs, atol=1e-6, rtol=0)
        torch.testing.assert_close(layer.weight, other.weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours(IDS).logits, before, atol=1e-6, rtol=0)
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=5.)
    for _ in range(3): step(ours, optimizer)
    save_lora(ours, tmp_path)
    for again in (load_lora(llama(), tmp_path), PeftModel.from_pretrained(llama(), tmp_path)):
        torch.testing.assert_close(again(IDS).logits, ours(IDS).logits, atol=2e-6, rtol=0)
    assert (ours(IDS).logits-before).abs().max() > .01
    with pytest.raises(FtkitError, match='without dora'): add_lora(llama(), init='pissa', dora=True)
    assert all(torch.equal(weights[n], p) for n,p in llama().named_parameters())

def test_lora_plus_groups_equal_peft():
    from peft.optimizers import create_loraplus_optimizer
    ours,peft = pair()
    theirs = create_loraplus_optimizer(peft, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=.1)
    mine = torch.optim.AdamW(lora_plus(ours, 1e-3, weight_decay=.1))
    rates = lambda o: sorted((g['lr'], g['weight_decay'], p.numel()) for g in o.param_groups for p in g['params'])
    assert rates(mine) == rates(theirs)
    losses = [[step(m, o) for _ in range(10)] for m,o in ((ours, mine), (peft, theirs))]
    torch.testing.assert_close(*map(torch.tensor, losses), atol=1e-5, rtol=0) # Adam divides by small gradients

def test_several_adapters_equal_peft():
    ours,peft = pair(targets=['q_proj', 'embed_tokens'])
    add_lora(ours, 4, 8, ['q_proj', 'embed_tokens'], adapter='two', seed=3)
    for n,t in lora_state_dict(ours, 'two').items(): torch.nn.init.normal_(t, std=.1)
    peft.add_adapter('two', peft.peft_config['default'])
    from peft import set_peft_model_state_dict
    set_peft_model_state_dict(peft, lora_state_dict(ours, 'two'), 'two')
    ours.eval(), peft.eval()
    for name in ('default', 'two'):
        set_adapter(ours, name), peft.set_adapter(name)
        torch.testing.assert_close(ours(IDS).logits, peft(IDS).logits, atol=1e-6, rtol=0)
    with adapter_rows(ours, ['two', '', 'default']): mixed = ours(IDS).logits
    torch.testing.assert_close(mixed, peft(IDS, adapter_names=['two', '__base__', 'default']).logits, atol=1e-6, rtol=0)
    for how in ('cat', 'linear'):
        combine(ours, ['default', 'two'], [.7, -.2], how, how)
        peft.add_weighted_adapter(['default', 'two'], [.7, -.2], how, combination_type=how)
        peft.set_adapter(how)
        torch.testing.assert_close(ours(IDS).logits, peft(IDS).logits, atol=1e-6, rtol=0)
    set_adapter(ours, 'default', 'two')
    both = ours(IDS).logits
    combine(ours, ['default', 'two'], [1, 1], adapter='sum')
    torch.testing.assert_close(ours(IDS).logits, both, atol=1e-6, rtol=0)

@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('kinds', KINDS, ids=str)
def test_merged_equals_adapted_and_the_base_is_untouched(kinds, tied):
    ours,_ = pair(tied, **kinds)
    frozen = {n: (p, p.detach().clone()) for n,p in ours.named_parameters() if 'adapters' not in n}
    wanted = ours(IDS).logits
    merged = merge_lora(ours)
    torch.testing.assert_close(merged(IDS).logits, wanted, atol=2e-6, rtol=0)
    assert all(torch.equal(p, before) for p,before in frozen.values())
    assert not merged.config.tie_word_embeddings and not lora_layers(merged)

def test_counts_equal_peft(shared):
    for folder in sorted((shared/'memory'/'configs').iterdir()):
        config = AutoConfig.from_pretrained(folder)
        for r,targets in ((16, 'all-linear'), (8, ['q_proj', 'v_proj'])):
            with torch.device('meta'): peft = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(
                r=r, target_modules=targets, task_type='CAUSAL_LM', use_dora=r == 8))
            assert count_lora(folder, r, targets, dora=r == 8) == peft.get_nb_trainable_parameters()
            print(folder.name, r, count_lora(folder, r, targets, dora=r == 8))

def test_another_models_adapter_is_refused(tmp_path):
    ours,_ = pair()
    save_lora(ours, tmp_path)
    torch.manual_seed(0)
    wider = LlamaForCausalLM(LlamaConfig(**SIZES | dict(vocab_size=100), tie_word_embeddings=False))
    with pytest.raises(FtkitError, match='2 of 20 matrices do not fit'): load_lora(wider, tmp_path)
    deeper = LlamaForCausalLM(LlamaConfig(**SIZES | dict(num_hidden_layers=3), tie_word_embeddings=False))
    load_lora(deeper, tmp_path) # only named layers are adapted
    shallow = LlamaForCausalLM(LlamaConfig(**SIZES | dict(num_hidden_layers=1), tie_word_embeddings=False))
    with pytest.raises(FtkitError, match='is called'): load_lora(shallow, tmp_path)
    config = json.loads((tmp_path/'adapter_config.json').read_text())
    (tmp_path/'adapter_config.json').write_text(json.dumps(config | dict(rank_pattern={'q_proj': 2})))
    with pytest.raises(FtkitError, match='rank_pattern is not written here'): load_lora(llama(), tmp_path)

def test_dropout_is_peft_s():
    kinds = dict(r=4, lora_alpha=8, lora_dropout=.3, target_modules=['q_proj', 'down_proj'], task_type='CAUSAL_LM')
    for dora in (False, True):
        peft = get_peft_model(llama(), LoraConfig(**kinds, use_dora=dora)).train()
        ours = add_lora(llama(), 4, 8, ['q_proj', 'down_proj'], .3, dora=dora).train()
        for n,t in lora_state_dict(ours).items():
            if 'magnitude' not in n: torch.nn.init.normal_(t, std=.1)
        load_into_peft(peft, lora_state_dict(ours))
        torch.manual_seed(5)
        a = ours(IDS).logits
        torch.manual_seed(5)
        torch.testing.assert_close(a, peft(IDS).logits, atol=1e-6, rtol=0)

def test_half_precision_bases_keep_32_bit_adapters():
    for dtype in (torch.bfloat16, torch.float16):
        ours = add_lora(llama(dtype=dtype), 4, 8, EVERYWHERE)
        peft = get_peft_model(llama(dtype=dtype), LoraConfig(r=4, lora_alpha=8, target_modules=EVERYWHERE,
                                                            task_type='CAUSAL_LM'))
        for n,t in lora_state_dict(ours).items(): torch.nn.init.normal_(t, std=.1)
        load_into_peft(peft, lora_state_dict(ours))
        a,b = ours(IDS).logits,peft(IDS).logits
        assert a.dtype == b.dtype == dtype
        assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
        torch.testing.assert_close(a, b, atol=4*torch.finfo(dtype).eps, rtol=0)

def test_refusals_leave_the_model_as_it_was(tmp_path):
    model,names = llama(),{n for n,_ in llama().named_modules()}
    save_lora(add_lora(LlamaForCausalLM(LlamaConfig(**SIZES | dict(intermediate_size=64))), 2), tmp_path)
    (tmp_path/'cut').mkdir()
    works = {'made for another model': lambda: load_lora(model, tmp_path),
             'no whole adapter': lambda: load_lora(model, tmp_path/'cut'),
             'token 99999 is not one of the 96': lambda: add_lora(model, tokens=[99999]),
             'is no pattern': lambda: add_lora(model, targets='((('),
             'must have no dots': lambda: add_lora(model, adapter='a.b'),
             "adapter zzz is unknown: there are none": lambda: save_lora(model, tmp_path/'x', 'zzz'),
             'no config of a model there': lambda: count_lora('/nowhere')}
    for says,work in works.items():
        with pytest.raises(FtkitError, match=says): work()
        assert {n for n,_ in model.named_modules()} == names, says
    add_lora(model, 2)
    with pytest.raises(FtkitError, match='typo is unknown'):
        with adapter_rows(model, ['typo']): pass
    with pytest.raises(FtkitError, match='1 adapters and 2 weights'): combine(model, ['default'], [.5, .5])

def test_what_needs_peft_is_not_misread(tmp_path):
    for options in (dict(init_lora_weights='pissa'), dict(trainable_token_indices={'embed_tokens': [7, 5]}),
                    dict(trainable_token_indices={'embed_tokens': [5, 7], 'lm_head': [9, 12]})):
        config = LoraConfig(r=2, target_modules=['q_proj'], task_type='CAUSAL_LM', **options)
        get_peft_model(llama(), config).save_pretrained(tmp_path)
        with pytest.raises(FtkitError, match='is not written here: load it with PEFT'): load_lora(llama(), tmp_path)

def test_a_model_in_four_bits_with_an_adapter_is_merged_either_way_round():
    from ftkit.nf4 import quantize_model
    first,second = add_lora(quantize_model(llama()), 4),quantize_model(add_lora(llama(), 4))
    for model in (first, second):
        for n,t in lora_state_dict(model).items(): torch.nn.init.constant_(t, .1)
        wanted = model(IDS).logits
        torch.testing.assert_close(merge_lora(model)(IDS).logits, wanted, atol=1e-5, rtol=0)

def test_a_model_without_numbers_keeps_all_its_names():
    from ftkit.lora import meta_model
    assert len(lora_state_dict(add_lora(meta_model(LlamaConfig(**SIZES)), 2))) == 2*14
