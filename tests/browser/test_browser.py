"Each widget in a real browser: it appears, hears mouse and keyboard, has names, fits a phone, is legible in the dark"
import re, pytest
from person import CUT, FAINT, WIDE, Widget
from server import notebook
from test_widgets import CASES

pytestmark = pytest.mark.browser
each_widget = pytest.mark.parametrize('name', CASES)

@pytest.mark.parametrize('by', ['mouse', 'keys'])
@each_widget
def test_every_control_changes_the_picture(site, name, by):
    widget = Widget(site.page(), f'{name}-{by}')
    for step in CASES[name].steps: widget.check(*step, by=by)

@each_widget
def test_the_check_finds_a_widget_that_does_not_listen(site, name):
    widget = Widget(site.page(), f'{name}-deaf')
    with pytest.raises(AssertionError, match='changes nothing'):
        for step in CASES[name].steps: widget.check(*step, by='mouse', seconds=2)

BAD = """<div class="ft-bad"><div class="widget-html-content"><b>black</b> <i style="color:#999">pale</i>
<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw="> <p style="width:2000px">wide</p></div>
<div style="height:4px;overflow:hidden"><b role="slider" aria-label="low" tabindex="0">handle</b></div>
<label>named <input></label> <input> <button tabindex="-1">skipped</button></div>"""

def test_the_other_checks_find_faults(browser):
    page = browser.new_page()
    page.set_content(BAD)
    bad = Widget(page, 'bad')
    assert bad.root.evaluate(FAINT) == ['pale']
    assert [e[:20] for e in bad.root.evaluate(WIDE)] == ['<p style="width:2000']
    assert bad.root.evaluate(CUT) == 1
    assert bad.nameless() == ['- img', '- textbox']
    assert [e[:7] for e in bad.unreachable()] == ['<button']

@each_widget
def test_controls_and_pictures_have_names(site, name): assert not Widget(site.page(), f'{name}-keys').nameless()

@each_widget
def test_the_tab_key_reaches_every_control(site, name): assert not Widget(site.page(), f'{name}-keys').unreachable()

@pytest.mark.parametrize('theme', ['light', 'dark'])
@pytest.mark.parametrize('width', [1100, 390], ids=['desktop', 'phone'])
@each_widget
def test_looks(site, shots, name, width, theme):
    page = site.page(theme)
    page.set_viewport_size(dict(width=width, height=2000)) # no widget is cut off
    widget = Widget(page, f'{name}-mouse')
    widget.root.scroll_into_view_if_needed()
    page.wait_for_timeout(300)
    widget.root.screenshot(path=shots/f'{site.kind}-{theme}-{width}-{name}.png')
    assert not widget.root.evaluate(WIDE)
    assert not widget.root.evaluate(FAINT)
    assert not widget.root.evaluate(CUT)

RUN = """model = load_model('embedded', tok)
trained = train(model, tok, rows(256), out=run/'sft', max_steps=5000, callbacks=[monitor(2)], report_to=[])
print('ended at step', trained.log[-1]['step'])"""

def test_a_run_is_watched_and_ended(site, shots):
    if site.kind == 'voila': pytest.skip('Voila has no button that interrupts a kernel')
    page = site.open(notebook(site.folder/'monitor.ipynb', 'from ftkit.train import train', RUN))
    output = page.locator('.jp-OutputArea-output')
    output.get_by_role('img', name='curves of the run').wait_for()
    output.get_by_text(re.compile('step [1-9][0-9] of 5000')).wait_for()
    page.get_by_role('button', name='Interrupt the kernel').click()
    end = output.get_by_text('ended at step')
    end.wait_for()
    page.screenshot(path=shots/'jupyterlab-light-1100-monitor.png')
    assert int(end.inner_text().split()[-1]) < 5000

def test_console_is_free_of_errors(site): assert not site.errors
