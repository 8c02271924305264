package main

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
)

// Every command's -h is a manual page with the same sections in the same order,
// every option explained, and lines that fit a terminal.
func TestManualPages(t *testing.T) {
	defaults := map[string][]string{
		"demo":      {"--controller NAME", "Default: actuated", "--data DIR", "--for DURATION", "--grpc ADDR", "--grpc-cert FILE", "--json", "--listen ADDR", "Default: 127.0.0.1:8080", "--seed N", "Default: 1", "--sumo FILE", "--mqtt ADDR", "--mqtt-ws ADDR"},
		"consensus": {"--config FILE", "--check", "--write-config DIR", "--data DIR", "--nats URL", "/healthz"},
		"simulate":  {"--config FILE", "--controller NAME", "Default: maxpressure", "--rules NAME", "Default: free", "--sensing NAME", "Default: detectors", "--seed N", "Default: 1", "--tripinfo FILE", "--pipeline", "--json"},
		"verify":    {"--policy FILE", "--json", "EXIT STATUS", "3  consistent in itself"},
		"audit":     {"audit chain --data DIR --junction ID --at TIME", "--after MARK", "--all", "--case NUMBER", "--from TIME", "--junction ID", "--limit MANY", "--out FILE", "--unbroken DEVICE", "--json", "EXIT STATUS"},
		"fsck":      {"--policy FILE", "--signatures", "--checkpoint FILE", "--json", "EXIT STATUS"},
		"repair":    {"--from SOURCE", "--nats URL", "--dry-run", "--policy FILE", "EXIT STATUS"},
		"enrol":     {"--data DIR", "--device ID", "--junction ID", "--key FILE", "--public-key FILE", "--revoke", "--url URL", "Default: http://127.0.0.1:8080", "--wait DURATION", "Default: 10s"},
		"onboard":   {"--gateway URL", "--claim TEXT", "--out DIR", "--pin HEX", "--rotate", "--json", "--wait DURATION", "Default: 30s", "device.key"},
		"replay":    {"--hires FILE", "--data DIR", "--speed PACE", "Default: max", "--zone ZONE", "Default: UTC", "--device NAME", "--json", "--verbose"},
		"measures":  {"--measure NAMES", "Default: all", "--config FILE", "--bin LENGTH", "Default: 15m0s", "--format FORM", "Default: csv", "--out DIR", "--red-occupancy SHARE", "Default: 0.8", "EXIT STATUS"},
		"registry":  {"registry show [TYPE [ID]]", "--blocks BLOCKS", "Default: 5000000", "--file FILE", "--id ID", "--json", "--key FILE", "--out FILE", "--revoke", "--type TYPE", "--url URL", "Default: http://127.0.0.1:8080", "--wait DURATION", "Default: 10s"},
		"retention": {"retention due", "--dry-run", "--json"},
		"hold":      {"hold place", "--case CASE", "--by WHO", "--classes CLASSES", "--junctions JUNCTIONS", "--devices DEVICES", "--leaves LEAVES", "--from TIME", "--to TIME", "--id ID", "--out FILE", "--key FILE", "--url URL"},
		"redact":    {"redact bases", "--leaf INDEX", "--basis CODE", "--reference TEXT", "--data DIR", "--commitment HEX", "--out FILE", "--key FILE", "--url URL"},
		"token":     {"--client ID", "--data DIR", "--device ID", "--for DURATION", "0 is 24h", "--json", "--once"},
		"policy":    {"--client ID", "--method METHOD", "--object OBJECT", "--purpose CODE", "--json"},
		"bench":     {"--scenarios DIR", "--out DIR", "--seeds N", "Default: 10", "--tracks LIST", "--controllers LIST"},
		"witness":   {"--config FILE", "--check", "--write-config DIR", "--name NAME", "--log VKEY", "--listen ADDRESS", "Default: 127.0.0.1:7380", "/add-checkpoint"},
		"log":       {"log check", "--genesis FILE", "--policy FILE", "--seen FILE", "EXIT STATUS"},
		"plan":      {"plan check", "plan diff A B", "plan export ID", "plan simulate", "--config FILE", "--json", "EXIT STATUS"},
		"version":   {},
	}
	option := regexp.MustCompile(`(?m)^    --[a-z-]+( [A-Z]+)?\n        \S`)
	anyOption := regexp.MustCompile(`(?m)^    --`)
	overview := inside(t, "help")
	wantExit(t, overview, exitOK, "NAME\n    stopline - ", "\nSYNOPSIS\n", "\nCOMMANDS\n", "\nEXIT STATUS\n")
	for _, c := range commands() {
		t.Run(c.name, func(t *testing.T) {
			want, listed := defaults[c.name]
			if !listed {
				t.Fatalf("the test does not know command %s", c.name)
			}
			if !strings.Contains(overview.out, "\n    "+c.name+" ") || !strings.Contains(overview.out, c.summary) {
				t.Errorf("stopline help does not list %s:\n%s", c.name, overview.out)
			}
			page := inside(t, c.name, "-h")
			wantExit(t, page, exitOK, want...)
			if page.err != "" {
				t.Errorf("-h wrote to standard error: %s", page.err)
			}
			for _, args := range [][]string{{c.name, "--help"}, {"help", c.name}} {
				if r := inside(t, args...); r != page {
					t.Errorf("stopline %s: got %v\nwant the page of -h", strings.Join(args, " "), r)
				}
			}
			last := -1
			for _, section := range []string{"NAME\n    stopline " + c.name + " - " + c.summary + "\n", "\nSYNOPSIS\n    stopline " + c.name, "\nDESCRIPTION\n    ", "\nOPTIONS\n    --"} {
				at := strings.Index(page.out, section)
				if c.name == "version" && strings.HasPrefix(section, "\nOPTIONS") {
					continue
				}
				if at <= last {
					t.Errorf("%q is missing or out of order in\n%s", section, page.out)
				}
				last = at
			}
			_, options, _ := strings.Cut(page.out, "\nOPTIONS\n")
			if got, want := len(option.FindAllString(options, -1)), len(anyOption.FindAllString(options, -1)); got != want {
				t.Errorf("%d of %d options have a name in capitals and an explanation:\n%s", got, want, page.out)
			}
			body := page.out[strings.Index(page.out, "\nDESCRIPTION"):]
			for line := range strings.Lines(body) {
				if len([]rune(line)) > 92 || strings.TrimRight(line, " \n") != strings.TrimRight(line, "\n") {
					t.Errorf("line of %d letters, or with blanks at its end: %q", len([]rune(line)), line)
				}
			}
		})
	}
}

func TestWrongUsage(t *testing.T) {
	for _, c := range []struct {
		args []string
		text string
	}{
		{nil, "SYNOPSIS"},
		{[]string{"fly"}, "no command \"fly\"; `stopline help` lists them"},
		{[]string{"help", "fly"}, "no command \"fly\""},
		{[]string{"demo", "now"}, "takes no arguments"},
		{[]string{"demo", "--for", "soon"}, "stopline demo -h"},
		{[]string{"demo", "--for", "-1s"}, "--for -1s: must not be negative"},
		{[]string{"demo", "--controller", "x"}, "must be one of fixed, actuated, maxpressure"},
		{[]string{"demo", "--sensing", "x"}, "must be oracle or detectors"},
		{[]string{"demo", "--seed", "-1"}, "--seed -1: must be 0 to"},
		{[]string{"simulate"}, "--config is needed"},
		{[]string{"verify", "--policy"}, "flag needs an argument"},
		{[]string{"fsck", "a", "b"}, "got 2 arguments"},
		{[]string{"measures"}, "a log is needed"},
		{[]string{"consensus"}, "either --config or --write-config"},
		{[]string{"witness"}, "either --config or --write-config"},
		{[]string{"log", "check", "http://127.0.0.1:1"}, "--genesis and one URL"},
		{[]string{"demo", "--need-witnesses", "1"}, "there are 0 of --witness"},
		{[]string{"consensus", "--config", "x", "--nats", "y"}, "only with --write-config"},
		{[]string{"consensus", "--write-config", "x", "--nats", "y"}, "needs --data and --nats"},
		{[]string{"demo", "--external-validators"}, "--external-validators: needs --nats"},
		{[]string{"demo", "--nats-users", "x"}, "--nats-users: needs --nats"},
		{[]string{"registry"}, "show, propose, sign or submit is needed"},
		{[]string{"registry", "drop"}, "got \"drop\""},
		{[]string{"registry", "show", "a", "b", "c"}, "got 3 arguments"},
		{[]string{"registry", "propose", "--type", "policy", "--id", "x", "--out", "y"}, "either --file or --revoke"},
		{[]string{"registry", "propose", "--type", "policy", "--id", "x", "--out", "y", "--file", "z", "--revoke"}, "either --file or --revoke"},
		{[]string{"registry", "sign", "x"}, "--key and one proposal"},
		{[]string{"registry", "submit", "--key", "x"}, "--key and one proposal"},
		{[]string{"enrol"}, "--data and --device are needed"},
	} {
		r := inside(t, c.args...)
		if r.code != exitUsage || !strings.Contains(r.err, c.text) || r.out != "" {
			t.Errorf("stopline %s: got %v\nwant exit 2 and %q on standard error only", strings.Join(c.args, " "), r, c.text)
		}
	}
}

// The exit code reaches the shell.
func TestExitCodeOfProcess(t *testing.T) {
	wantExit(t, stopline(t, "fly"), exitUsage, "stopline: no command \"fly\"")
	wantExit(t, stopline(t, "version"), exitOK, "stopline ")
}

// The scripts that README shows are at least shell scripts.
func TestScriptParses(t *testing.T) {
	optional(t, "sh", "STOPLINE_REQUIRE_OPENSSL")
	for _, script := range []string{"testdata/send-frame.sh", "testdata/mqtt-frame.sh"} {
		if b, err := exec.Command("sh", "-n", script).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, b)
		}
		if s, err := os.Stat(script); err != nil || s.Size() == 0 {
			t.Errorf("%v, %v", s, err)
		}
	}
}
