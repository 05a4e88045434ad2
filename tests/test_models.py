"Loading, tuning and saving: what must not change does not, and what is saved comes back"
import hashlib
import pytest, torch
from ftkit.core import FtkitError
from ftkit.models import folded, load_model, load_tokenizer, load_tuned, save
from ftkit.tasks import rows
from ftkit.train import read_log, train

def digest(model):
    "Hash of every weight that is not trained"
    h = hashlib.sha256()
    for _,p in sorted(model.named_parameters(), key=lambda np: np[0]):
        if not p.requires_grad: h.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()

def logits(model, tok):
    ids = tok('The capital of France is', return_tensors='pt').input_ids.to(model.device)
    model.eval()
    with torch.no_grad(): return model(input_ids=ids).logits.cpu()

@pytest.mark.parametrize('adapter', ['lora', 'qlora', 'full'])
def test_tuned_saved_and_loaded(tmp_path, monkeypatch, adapter):
    monkeypatch.setenv('IN_TEST', '1')
    tok = load_tokenizer('embedded')
    model = load_model('embedded', tok, adapter)
    frozen,before = digest(model),logits(model, tok)
    run = train(model, tok, rows(160), out=tmp_path/'run', max_steps=10, per_device_train_batch_size=16,
                learning_rate=2e-3)
    losses = [e['loss'] for e in run.log if 'loss' in e]
    assert losses[-1] < losses[0]-1
    assert digest(model) == frozen, 'the base never changes'
    tuned = logits(model, tok)
    assert (tuned-before).abs().max() > .1
    tok2,model2 = load_tuned(run.path)
    assert tok2.chat_template == tok.chat_template and tok2.pad_token == tok.pad_token != tok2.eos_token
    torch.testing.assert_close(logits(model2, tok2), tuned, atol=0, rtol=0)

def test_the_digest_sees_a_changed_weight():
    tok = load_tokenizer('embedded')
    model = load_model('embedded', tok)
    before = digest(model)
    with torch.no_grad(): next(p for p in model.parameters() if not p.requires_grad)[0, 0] += 1e-6
    assert digest(model) != before

def test_plain_transformers_and_peft_load_what_is_saved(tmp_path):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from ftkit.tiny import base
    assert sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base()).parameters()) < 3e6
    tok = load_tokenizer('embedded')
    model = load_model('embedded', tok)
    for p in model.parameters():
        if p.requires_grad: torch.nn.init.normal_(p, std=.02)
    save(model, tok, tmp_path/'tuned')
    tok2,model2 = (cls.from_pretrained(tmp_path/'tuned') for cls in (AutoTokenizer, AutoPeftModelForCausalLM))
    assert torch.equal(logits(model2, tok2), logits(model, tok))

def test_an_adapter_of_the_embedded_model_moves_to_another_machine(tmp_path):
    import json
    tok = load_tokenizer('embedded')
    folder = save(load_model('embedded', tok), tok, tmp_path/'tuned')
    config = json.loads((folder/'adapter_config.json').read_text())
    (folder/'adapter_config.json').write_text(json.dumps({**config, 'base_model_name_or_path': '/no/such/folder'}))
    assert torch.isfinite(logits(load_tuned(folder)[1], tok)).all()

def test_saving_over_an_old_model_leaves_only_the_new(tmp_path):
    tok = load_tokenizer('embedded')
    (tmp_path/'tuned').mkdir()
    for name in ('old.txt', 'ftkit.json'): (tmp_path/'tuned'/name).write_text('{}')
    save(load_model('embedded', tok), tok, tmp_path/'tuned')
    assert [p.name for p in tmp_path.iterdir()] == ['tuned'] and not (tmp_path/'tuned'/'old.txt').exists()

def test_saving_that_fails_leaves_the_old_model(tmp_path, monkeypatch):
    tok = load_tokenizer('embedded')
    model = load_model('embedded', tok)
    old = save(model, tok, tmp_path/'tuned')
    content = (old/'adapter_model.safetensors').read_bytes()
    for p in model.parameters():
        if p.requires_grad: torch.nn.init.ones_(p)
    monkeypatch.setattr(type(tok), 'save_pretrained', lambda *a, **k: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(FtkitError, match='disk full.*nothing was saved'): save(model, tok, tmp_path/'tuned')
    assert [f.name for f in tmp_path.iterdir()] == ['tuned']
    assert (old/'adapter_model.safetensors').read_bytes() == content

def test_all_rows_of_an_epoch_are_seen_when_steps_follow_from_epochs(tmp_path, monkeypatch):
    monkeypatch.setenv('IN_TEST', '1')
    tok = load_tokenizer('embedded')
    train(load_model('embedded', tok), tok, rows(50), out=tmp_path/'run', max_steps=-1, num_train_epochs=2,
          per_device_train_batch_size=16)
    assert max(e['step'] for e in read_log(tmp_path/'run')) == 8

def test_a_weight_without_a_gradient_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv('IN_TEST', '1')
    tok = load_tokenizer('embedded')
    model = load_model('embedded', tok)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    layer.register_forward_hook(lambda layer, args, out: out.detach())
    with pytest.raises(FtkitError, match='2 trained weights get no gradient, such as .*layers.1.mlp.up_proj.lora_A'):
        train(model, tok, rows(40), out=tmp_path/'run', max_steps=2, per_device_train_batch_size=16)

def test_unknown_adapter():
    tok = load_tokenizer('embedded')
    with pytest.raises(FtkitError, match='use lora, qlora, full or None'): load_model('embedded', tok, 'loro')

def test_a_4bit_model_trains_the_same_after_an_evaluation():
    "bitsandbytes' CPU kernel for inference has no gradient: a model once evaluated must not be left on it"
    tok = load_tokenizer('embedded')
    ids = tok('The capital of France is Paris.', return_tensors='pt').input_ids
    def gradient(evaluate):
        model = load_model('embedded', tok, 'qlora')
        for n,p in model.named_parameters():
            if 'lora_B' in n: torch.nn.init.constant_(p, .01)
        if evaluate: logits(model, tok)
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        return {n:p.grad.clone() for n,p in model.named_parameters() if p.requires_grad}
    fresh,evaluated = gradient(False),gradient(True)
    assert all(g.abs().max() > 0 for g in fresh.values())
    for n,g in fresh.items(): torch.testing.assert_close(evaluated[n], g, atol=0, rtol=0)

def test_files_are_read_without_a_bar_and_downloads_keep_theirs():
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils.logging import is_progress_bar_enabled
    load_model('embedded', load_tokenizer('embedded'), None)
    assert not is_progress_bar_enabled() and not are_progress_bars_disabled()

@pytest.mark.parametrize('options,inside', [
    (dict(), True), (dict(use_dora=True), True), (dict(trainable_token_indices=None), True),
    (dict(target_modules=['q_proj', 'lm_head']), False),
    (dict(target_modules=['q_proj', 'embed_tokens'], trainable_token_indices=None), False),
    (dict(lora_bias=True), False), (dict(precision='bf16'), False)], ids=str)
def test_folding_an_adapter_changes_nothing(options, inside):
    "Nor does it do so where it cannot: tied ends, biases that are not there, half the bits"
    tok = load_tokenizer('embedded')
    model = load_model('embedded', tok, **dict(precision='fp32') | options)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(torch.randn_like(p)*.02)
    before,kept,places = logits(model, tok),digest(model),[p.data_ptr() for p in model.parameters()]
    with folded(model):
        assert any(getattr(m, 'merged', False) for m in model.modules()) == inside
        torch.testing.assert_close(logits(model, tok), before, atol=5e-5, rtol=1e-5)
    with pytest.raises(KeyError), folded(model): raise KeyError
    assert digest(model) == kept and [p.data_ptr() for p in model.parameters()] == places
    assert not any(getattr(m, 'merged', False) for m in model.modules())
    assert torch.equal(logits(model, tok), before)

def own_template(name='embedded'):
    "A tokenizer with a template of its own, as those of Qwen's base models have"
    tok = load_tokenizer(name)
    tok.chat_template += '{# its own #}'
    return tok, [tok.convert_tokens_to_ids(t) for t in ('<|im_start|>', '<|im_end|>')]

def test_tokens_that_a_model_has_never_met():
    "Are trained with the adapter, though nobody gave it the template; without that the last one is one of 310 alike"
    tok,ids = own_template()
    model = load_model('embedded', tok)
    assert model.peft_config['default'].trainable_token_indices == dict(embed_tokens=ids)
    plain = load_model('embedded', tok, trainable_token_indices=None)
    assert not plain.peft_config['default'].trainable_token_indices
    rows = plain.get_output_embeddings().weight.detach()
    alike = (torch.cdist(rows, rows[ids[1:]]) < .1).sum()
    with torch.no_grad(): odds = plain(input_ids=torch.arange(200)[None]).logits.softmax(-1)[..., ids[1]]
    assert alike == 310 and odds.max() < 1.2/310 # they are alike to a few hundredths

def small(tok, tied=True, **options):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes | dict(vocab_size=len(tok)+8, tie_word_embeddings=tied) | options))

@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('how', ['met', 'zero', 'as one that is in no text', 'head alone'])
def test_rows_of_a_template(how, tied):
    "Distinct rows are left alone; others are named, of the embedding, or of a head of its own if they end answers"
    from ftkit.models import untrained
    if how == 'head alone' and tied: pytest.skip('there is none')
    tok,ids = own_template()
    model = small(tok, tied)
    layer = model.get_output_embeddings() if how == 'head alone' else model.get_input_embeddings()
    with torch.no_grad():
        if how == 'zero': layer.weight[ids] = 0
        elif how != 'met': layer.weight[ids] = layer.weight[[-1]] + 1e-4*torch.randn(2, 32)
    assert untrained(model, tok) == dict(met=[]).get(how, ids[1:] if how == 'head alone' else ids)

def test_rows_that_cannot_be_told():
    "Rows that are not there were never met; a head of another kind says nothing, nor a chat that is refused"
    from ftkit.models import untrained
    tok,ids = own_template()
    assert untrained(small(tok, vocab_size=3), tok) == ids[1:]
    model = small(tok, False)
    for head in (torch.nn.Identity(), torch.nn.Linear(2, 2, device='meta')):
        model.set_output_embeddings(head)
        assert untrained(model, tok) == []
    tok.chat_template = "{{ raise_exception('no chat') }}"
    assert untrained(model, tok) == []
    load_model('embedded', tok, reward=True)

def test_many_rows_that_nobody_met_at_the_beginning():
    "What is usual is seen at words, wherever they are: some tokenizers begin with a thousand tokens that are none"
    from ftkit.models import untrained
    tok,ids = own_template()
    tok.add_tokens([f'<|unused {k}|>' for k in range(3000)])
    model = small(tok)
    with torch.no_grad(): model.get_input_embeddings().weight[[*ids, *range(1024, 4024)]] *= 1e-4
    assert untrained(model, tok) == ids

@pytest.mark.parametrize('options', [dict(modules_to_save=['embed_tokens']), dict(modules_to_save=['lm_head']),
                                     dict(target_modules=['q_proj', 'embed_tokens'])], ids=str)
def test_matrices_that_are_trained_whole(options):
    "Need no rows of their own, and PEFT would not have both"
    tok,_ = own_template()
    model = load_model('embedded', tok, **options)
    assert not model.peft_config['default'].trainable_token_indices

def test_tokens_of_other_models(shared):
    "No control token of a chat, no ids; a row of each that is in a real template, and not of its words"
    from ftkit.models import _controls
    tok = load_tokenizer(shared/'tokenizers'/'qwen3')
    all_,ends = map(tok.convert_ids_to_tokens, _controls(tok))
    assert {'<|im_start|>', '<|im_end|>'} <= {*all_} <= {*tok.get_added_vocab()} and ends == ['<|im_end|>']
    tok.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert _controls(tok) == ([], [])
