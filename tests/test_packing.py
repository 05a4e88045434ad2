"Packed equals padded on real architectures, and what lets documents see each other is found"
import pytest, torch
from ftkit.pack import Collator, leak, pack_dataset, packable
from ftkit.formats import as_dataset
from ftkit.tiny import tiny

SIZE = dict(vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512)
DENSE = dict(llama={}, qwen2={}, qwen3=dict(head_dim=16), gemma=dict(head_dim=16), mistral=dict(sliding_window=8))
# a state that goes from token to token, which nothing resets between documents
RECURRENT = dict(
    qwen3_next=dict(head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16,
                    linear_value_head_dim=16, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32,
                    shared_expert_intermediate_size=32, layer_types=['linear_attention', 'full_attention']),
    qwen3_5_text=dict(head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16,
                      linear_value_head_dim=16, layer_types=['linear_attention', 'full_attention']))

def build(kind, attention, **extra):
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZE, **extra)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()

@pytest.fixture
def documents():
    "Longer than the sliding window, and of different lengths"
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, 260, (n,), generator=g).tolist() for n in (31, 20, 17, 40, 5)]
    return as_dataset([dict(input_ids=i, labels=i) for i in ids])

def losses(model, batch):
    "Loss of every token by (document, place): padded rows and packed rows hold them in another order"
    labels = batch.pop('labels')
    with torch.no_grad(): logits = model(**batch).logits[:,:-1].float()
    cost = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:,1:], reduction='none', ignore_index=-100)
    kept = labels[:,1:] != -100
    return sorted(zip(batch['input_ids'][:,:-1][kept].tolist(), labels[:,1:][kept].tolist(), cost[kept].tolist()))

@pytest.mark.parametrize('attention', ['eager', 'sdpa'])
@pytest.mark.parametrize('kind', DENSE)
def test_packed_equals_padded(kind, attention, documents):
    tok,_ = tiny()
    model = build(kind, attention, **DENSE[kind])
    apart = losses(model, Collator(tok)(list(documents)))
    ways = dict(packed=Collator(tok, model)(list(pack_dataset(documents, 64))),
                padding_free=Collator(tok, model, padding_free=True)(list(documents)))
    for name,batch in ways.items():
        together = losses(model, batch)
        assert [t[:2] for t in together] == [a[:2] for a in apart], name
        worst = max(abs(t[2]-a[2]) for t,a in zip(together, apart))
        print(f'{kind} {attention} {name}: {worst:.1e}')
        assert worst < 1e-5
    assert leak(model, tok) == 0 and packable(model, tok) == ''

@pytest.mark.parametrize('attention', ['eager', 'sdpa'])
@pytest.mark.parametrize('kind', DENSE)
def test_packed_equals_padded_in_bf16(kind, attention, documents):
    "As near to each other as each is to fp32: the difference is bf16's own rounding"
    tok,_ = tiny()
    model = build(kind, attention, **DENSE[kind])
    exact = losses(model, Collator(tok)(list(documents)))
    model = model.bfloat16()
    apart,together = (losses(model, Collator(tok)(list(ds))) for ds in (documents, pack_dataset(documents, 64)))
    rounding = max(abs(a[2]-e[2]) for a,e in zip(apart, exact))
    assert max(abs(t[2]-a[2]) for t,a in zip(together, apart)) <= 2*rounding < .2
    assert leak(model, tok) == 0

@pytest.mark.parametrize('kind', ['llama', 'mistral'])
def test_leaks_are_found(kind):
    tok,_ = tiny()
    model = build(kind, 'sdpa', **DENSE[kind])
    collate = Collator(tok, model)
    def ones(examples): return collate(examples) | dict(attention_mask=torch.ones(1, 48, dtype=torch.long))
    def cache(examples): return collate(examples) | dict(use_cache=True)
    def no_positions(examples): return {k: v for k,v in collate(examples).items() if k != 'position_ids'}
    found = {f.__name__: leak(model, tok, f) for f in (ones, cache, no_positions)}
    print(kind, {k: f'{v:.2f}' for k,v in found.items()})
    assert min(found.values()) > 1e-2 and leak(model, tok, collate) == 0

@pytest.mark.parametrize('kind', RECURRENT)
def test_models_with_a_state_are_refused(kind, tmp_path):
    from ftkit.core import FtkitError
    from ftkit.train import train
    tok,_ = tiny()
    model = build(kind, 'sdpa', **RECURRENT[kind])
    print(kind, f'{leak(model, tok):.2f}')
    assert leak(model, tok) > 1e-2 and 'pad instead' in packable(model, tok)
    data = [dict(input_ids=[5]*9, labels=[5]*9)]*4
    with pytest.raises(FtkitError, match='pad instead'):
        train(model, tok, data, out=tmp_path/'run', packing=True, max_length=32)
    assert not (tmp_path/'run').exists()

def test_varlen_kernels_get_the_places(documents):
    "What flash attention needs, checked against the lengths"
    tok,model = tiny()
    model.config._attn_implementation = 'flash_attention_2'
    packed = pack_dataset(documents, 64)
    batch = Collator(tok, model)(list(packed))
    lengths = [n for row in packed for n in torch.tensor([i for i,p in enumerate(row['position_ids']) if p == 0]
                                                         + [len(row['input_ids'])]).diff().tolist()]
    assert batch['input_ids'].shape == (1, 113) and 'attention_mask' not in batch and batch['use_cache'] is False
    assert batch['cu_seq_lens_q'].diff().tolist() == lengths and batch['max_length_k'] == 40
    assert batch['cu_seq_lens_q'].dtype == torch.int32

def test_training_on_packed_rows_lowers_the_held_out_loss(tmp_path):
    from ftkit.chat import set_template
    from ftkit.tasks import rows
    from ftkit.train import train
    tok,model = tiny()
    set_template(tok)
    run = train(model, tok, rows(200), out=tmp_path/'run', eval_data=rows(20, 'test'), packing=True, max_length=256,
                max_steps=12, learning_rate=1e-2, per_device_train_batch_size=4)
    held = [e['eval_loss'] for e in run.log if 'eval_loss' in e]
    assert held[-1] < held[0]-1

def test_packed_and_padded_training_have_the_same_gradient(documents):
    tok,_ = tiny()
    grads = []
    for batch in (Collator(tok)(list(documents)), Collator(tok)(list(pack_dataset(documents, 128)))):
        _,model = tiny()
        from ftkit.logps import head
        from ftkit.train import OBJECTIVES
        found = OBJECTIVES['sft'].loss(model, head(model), batch)
        (found.losses.sum()/found.count).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*grads, atol=1e-6, rtol=0)

def test_training_from_a_stream(tmp_path):
    "Rows that are read while they are used give the same losses as the same rows in memory"
    import json
    from ftkit.chat import set_template
    from ftkit.core import FtkitError
    from ftkit.formats import load
    from ftkit.tasks import rows
    from ftkit.train import train
    (tmp_path/'rows.jsonl').write_text('\n'.join(json.dumps(dict(messages=r['messages'])) for r in rows(300)))
    losses = []
    for streaming in (True, False):
        tok,model = tiny()
        set_template(tok)
        data = load(tmp_path/'rows.jsonl', streaming=streaming)
        if not streaming: data = data.to_iterable_dataset()
        run = train(model, tok, data, out=tmp_path/str(streaming), max_steps=3, max_length=200)
        losses.append([e['loss'] for e in run.log if 'loss' in e])
    assert losses[0] == losses[1] and len(losses[0]) == 3
    with pytest.raises(FtkitError, match='max_steps'):
        train(model, tok, load(tmp_path/'rows.jsonl', streaming=True), out=tmp_path/'endless', max_steps=-1)
    with pytest.raises(FtkitError, match='cannot be packed'):
        stream = load(tmp_path/'rows.jsonl', streaming=True)
        train(model, tok, stream, out=tmp_path/'endless', packing=True, max_length=99)

def test_weights_of_two_types_pack_alike():
    "A row without weights among rows of 64-bit ones: each is read as what it is"
    from datasets import Dataset, concatenate_datasets
    rows = [dict(input_ids=[1, 2, 3], labels=[1, 2, 3], weights=[.5, .25, .125])]
    empty = [dict(input_ids=[4, 5], labels=[4, 5], weights=[])]
    whole = Dataset.from_list(rows)
    mixed = Dataset.from_list(empty + rows)
    for parts in ((whole, mixed), (mixed, whole)):
        packed = pack_dataset(concatenate_datasets(parts), 8)
        assert sorted(packed[0]['weights']) == [.125, .125, .25, .25, .5, .5, 1, 1]

def test_a_data_set_twice_is_packed_twice():
    "Documents that stand at the same address"
    from datasets import Dataset, concatenate_datasets
    ds = Dataset.from_list([dict(input_ids=[k]*n, labels=[k]*n) for k,n in ((3, 2), (4, 5), (5, 1))])
    ids = sorted(i for row in pack_dataset(concatenate_datasets([ds, ds]), 8)['input_ids'] for i in row)
    assert ids == [3]*4 + [4]*10 + [5]*2
