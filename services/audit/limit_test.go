package audit

import "testing"

func TestLimitRefusesWhatIsOneTooMany(t *testing.T) {
	l := newLimit(2)
	first, ok := l.begin()
	if !ok {
		t.Fatal("the first was refused")
	}
	if _, ok := l.begin(); !ok {
		t.Fatal("the second was refused")
	}
	if _, ok := l.begin(); ok {
		t.Error("a third was let in, want at most 2")
	}
	first()
	if _, ok := l.begin(); !ok {
		t.Error("refused although a place was given back")
	}
}
