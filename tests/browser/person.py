"What a person does and sees on a page with widgets, by mouse or by keyboard"
import re, time
from test_widgets import QUIET

# What the widget shows and that is no control, pictures by their bytes.
PICTURE = '''async root => {
    const read = async e => e.tagName != 'IMG' ? e.innerHTML :
        e.alt + btoa(String.fromCharCode(...new Uint8Array(await (await fetch(e.src)).arrayBuffer())))
    const all = root.querySelectorAll('.widget-html-content, .jp-OutputArea-output, .widget-image')
    return (await Promise.all([...all].map(read))).join('\\n') }'''
# How far a handle is along its track, from 0 to 1.
WHERE = 'e => 1 - Math.abs(new DOMMatrix(e.parentElement.style.transform.replaceAll("%", "px")).e)/1000'
CONTROLS = 'input, select, textarea, button, [role=slider]'
NAMELESS = re.compile(r'- (slider|combobox|textbox|spinbutton|checkbox|radio|button|listbox|img|switch|tab)\b(?! ".)')

# Text on a ground that is too much like it (the ratio of WCAG 2.2, 1.4.3).
FAINT = '''root => {
    const rgba = s => (s.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number)
    const light = c => [.2126, .7152, .0722].reduce((sum, k, i) =>
        sum + k*(c[i]/255 <= .04045 ? c[i]/255/12.92 : ((c[i]/255 + .055)/1.055)**2.4), 0)
    const ground = e => { for (; e; e = e.parentElement) {
        const c = rgba(getComputedStyle(e).backgroundColor); if (c[3] !== 0) return c }; return [255, 255, 255] }
    const texts = document.createTreeWalker(root, NodeFilter.SHOW_TEXT), faint = []
    for (let t; t = texts.nextNode();) {
        const e = t.parentElement
        const ours = e.closest('.widget-html-content, .jp-OutputArea-output') && e.checkVisibility()
        if (!ours || !t.data.trim()) continue
        const [a, b] = [light(rgba(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x)
        if ((a + .05)/(b + .05) < 4.5) faint.push(t.data.trim().slice(0, 40))
    }
    return faint }'''

# Elements that reach out of the place they are shown in, if it does not scroll by itself.
WIDE = '''root => {
    const place = root.closest('.jp-OutputArea-output, .jp-OutputArea-child') || document.body
    const right = Math.min(place.getBoundingClientRect().left + place.clientWidth, innerWidth) + 1
    const scrolls = e => e != root && (getComputedStyle(e).overflowX == 'auto' || scrolls(e.parentElement))
    return [...root.querySelectorAll('*')].filter(e => e.checkVisibility() && e.getBoundingClientRect().right > right
        && !scrolls(e.parentElement)).map(e => e.outerHTML.slice(0, 80)) }'''

# Handles of sliders of which a part is hidden, as the box they are in is too low.
CUT = '''root => [...root.querySelectorAll('[role=slider]')].filter(e => {
    const handle = e.getBoundingClientRect()
    for (let box = e.parentElement; box != root; box = box.parentElement) {
        const {top, bottom} = box.getBoundingClientRect()
        const clips = getComputedStyle(box).overflowY != 'visible'
        if (clips && (handle.top < top - 1 || handle.bottom > bottom + 1)) return true
    } }).length'''

class Widget:
    "A widget on a page, found by its class"
    def __init__(self, page, name): self.page,self.root = page,page.locator(f'.ft-{name}')

    def picture(self): return self.root.evaluate(PICTURE)

    def row(self, name):
        "A control with its label"
        label = self.root.locator('label, button').filter(has_text=re.compile(f'^\\s*{re.escape(name)}\\s*$')).first
        return label if label.evaluate('e => e.tagName') == 'BUTTON' else label.locator('xpath=..')

    def control(self, name, value):
        "What is to be clicked or focussed; of several choices, the one that says `value`"
        row = self.row(name)
        if row.evaluate('e => e.tagName') == 'BUTTON': return row
        choices = row.locator('button, label:has(input[type=radio])')
        if choices.count(): return choices.filter(has_text=re.compile(f'^\\s*{re.escape(str(value))}\\s*$')).first
        return row.locator(CONTROLS).first

    def tab_to(self, control):
        "Reach a control with the Tab key from the widget's beginning"
        self.root.evaluate('e => { e.tabIndex = -1; e.focus() }')
        for _ in range(60):
            self.page.keyboard.press('Tab')
            if control.evaluate('e => e == document.activeElement'): return
        raise AssertionError('no way there with the Tab key')

    def unreachable(self):
        "Controls that the Tab key never comes to"
        self.root.evaluate('e => { e.tabIndex = -1; e.focus() }')
        for _ in range(2*self.root.locator(CONTROLS).count() + 4):
            self.page.keyboard.press('Tab')
            self.page.evaluate('document.activeElement.dataset.reached = 1')
        return self.root.locator(CONTROLS).evaluate_all("""all => all.filter(e => !e.dataset.reached && !e.disabled &&
            e.type != 'radio' && e.checkVisibility()).map(e => e.outerHTML)""")

    def nameless(self):
        """Controls and pictures without a name for a screen reader. A slider of ipywidgets can have none: it has to
        stand beside a box or a list that says the same and has one"""
        beside = self.root.locator('.widget-hbox:has(> .widget-inline-hbox > .widget-label:not(:empty))')
        sliders = beside.locator('[role=slider]').count()
        found = [l.strip() for l in self.root.aria_snapshot().splitlines() if NAMELESS.match(l.strip())]
        return sorted(found, key=lambda l: 'slider' not in l)[sliders:]

    def slider(self, name):
        "The handle beside a box or a list, if there is one"
        in_box = 'xpath=self::*[parent::*[contains(@class, "widget-hbox")]]'
        return self.row(name).locator(in_box).locator('xpath=following-sibling::*[1]').locator('[role=slider]')

    def pull(self, control, handle, value):
        "Drag the handle to about where `value` is; arrow keys do the rest"
        options = control.locator('option').all_inner_texts()
        goal = options.index(str(value)) if options else float(value)
        low,high = (0, len(options)-1) if options else (float(control.get_attribute(end)) for end in ('min', 'max'))
        at = lambda: low + (high - low)*handle.evaluate(WHERE)
        track = handle.locator('xpath=ancestor::*[contains(@class, "noUi-base")]').bounding_box()
        handle.hover()
        self.page.mouse.down()
        self.page.mouse.move(track['x'] + track['width']*(goal - low)/(high - low), track['y'], steps=5)
        self.page.mouse.up()
        for _ in range(20):
            if abs(at() - goal) < 1e-3*(high - low): return
            handle.press('ArrowRight' if at() < goal else 'ArrowLeft')
        raise AssertionError(f'the slider stays at {at()}')

    def choose(self, control, value, by):
        "Take an entry of a list. It has to be opened: of a closed one, JupyterLab would take the arrow keys for itself"
        if by == 'mouse': return control.select_option(label=str(value))
        goal,at = control.locator('option').all_inner_texts().index(str(value)),control.evaluate('e => e.selectedIndex')
        keys = ['Space', *['ArrowDown' if goal > at else 'ArrowUp']*abs(goal-at), 'Enter']
        for key in keys:
            self.page.keyboard.press(key)
            if key == 'Space': self.page.wait_for_timeout(200)
        assert control.evaluate('e => e.selectedIndex') == goal

    def operate(self, name, value, by):
        "Make the control `name` say `value`"
        control,keyboard = self.control(name, value),self.page.keyboard
        control.scroll_into_view_if_needed()
        kind = control.evaluate('e => e.getAttribute("role") || e.type || e.tagName')
        if by == 'keys': self.tab_to(control)
        elif (handle := self.slider(name)).count(): return self.pull(control, handle, value)
        if kind.startswith('select'): self.choose(control, value, by)
        elif kind in ('text', 'number', 'textarea'):
            if by == 'mouse': control.click()
            keyboard.press('Control+a')
            keyboard.type(str(value))
            keyboard.press('Tab' if kind == 'textarea' else 'Enter')
        elif by == 'mouse': control.click()
        else: keyboard.press('Space')

    def says(self, name, value):
        "Does a box of numbers say so? Others are judged by what they change"
        control = self.control(name, value)
        return control.evaluate('e => e.type') != 'number' or control.input_value() == f'{value:g}'

    def check(self, name, value, sees, by, seconds=60):
        "Operate a control: the picture is another one, and `sees` stands in it"
        before,end = self.picture(),time.time() + seconds
        self.operate(name, value, by)
        if sees is QUIET: return
        while (now := self.picture()) == before or (sees or '') not in now or not self.says(name, value):
            assert time.time() < end, f'{name} changes nothing' if now == before else f'{sees or value} is not there'
            self.page.wait_for_timeout(100)
