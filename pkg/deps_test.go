// Package pkg_test keeps the promise of this module: what is in it knows no
// network, no process, no disk and no clock, and starts no goroutine.
package pkg_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// forbidden are packages that nothing in pkg may need, however far down. Each
// stands for itself and everything below it.
var forbidden = []string{
	"net", "os/exec", "os/signal", "os/user", "plugin", "database/sql",
	"github.com/nats-io", "google.golang.org/grpc", "google.golang.org/protobuf",
	"github.com/ThreeDotsLabs", "github.com/hyperledger-labs", "go.opentelemetry.io",
	"github.com/stopline-traffic/stopline/api", "github.com/stopline-traffic/stopline/services",
}

// direct are packages that no file of pkg may import itself. Others need them to
// print errors; we would only use them to reach a disk or a process.
var direct = []string{"os", "io/ioutil", "syscall", "log", "path/filepath", "unsafe", "runtime"}

func under(p string, list []string) bool {
	return slices.ContainsFunc(list, func(f string) bool { return p == f || strings.HasPrefix(p, f+"/") })
}

func deps(t *testing.T, pattern string) []string {
	t.Helper()
	out, err := exec.Command("go", "list", "-deps", pattern).Output()
	if err != nil {
		t.Fatalf("go list -deps %s: %v", pattern, err)
	}
	return strings.Fields(string(out))
}

func TestDeps(t *testing.T) {
	for _, p := range deps(t, "./...") {
		if p != "net/netip" && under(p, forbidden) { // addresses as values, in Cedar's types
			t.Errorf("pkg depends on %s", p)
		}
	}
	// The check can fail: this one does what pkg must not.
	if !slices.ContainsFunc(deps(t, "net/http"), func(p string) bool { return under(p, forbidden) }) {
		t.Error("the check finds nothing wrong with net/http")
	}
}

// impure returns what a file does that pkg must not.
func impure(fset *token.FileSet, f *ast.File) []string {
	var found []string
	bad := func(at token.Pos, format string, args ...any) {
		p := fset.Position(at)
		found = append(found, fmt.Sprintf("%s:%d: %s", p.Filename, p.Line, fmt.Sprintf(format, args...)))
	}
	timeName := ""
	for _, i := range f.Imports {
		path, err := strconv.Unquote(i.Path.Value)
		if err != nil {
			bad(i.Pos(), "import %s", i.Path.Value)
			continue
		}
		if under(path, direct) {
			bad(i.Pos(), "imports %s", path)
		}
		if path == "time" {
			timeName = "time"
			if i.Name != nil {
				timeName = i.Name.Name
			}
			if timeName == "." {
				bad(i.Pos(), "imports time without a name")
			}
		}
	}
	clock := []string{"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTimer", "NewTicker", "Local", "LoadLocation"}
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.GoStmt:
			bad(n.Pos(), "starts a goroutine")
		case *ast.SelectorExpr:
			if x, ok := n.X.(*ast.Ident); ok && x.Name == timeName && timeName != "" && slices.Contains(clock, n.Sel.Name) {
				bad(n.Pos(), "uses time.%s", n.Sel.Name)
			}
		}
		return true
	})
	return found
}

func TestPure(t *testing.T) {
	fset := token.NewFileSet()
	files := 0
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		f, err := parser.ParseFile(fset, path, nil, 0)
		if err != nil {
			return err
		}
		files++
		for _, x := range impure(fset, f) {
			t.Error(x)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if files < 10 {
		t.Errorf("got %d files, want all of pkg", files)
	}
}

// TestPureCanFail shows each thing that the check is there for.
func TestPureCanFail(t *testing.T) {
	for _, tt := range []struct{ name, src, want string }{
		{"clock", `package p; import "time"; var t = time.Now()`, "x.go:1: uses time.Now"},
		{"clock by another name", `package p; import hour "time"; func f() { hour.Sleep(1) }`, "x.go:1: uses time.Sleep"},
		{"clock as a value", `package p; import "time"; var now = time.Now`, "x.go:1: uses time.Now"},
		{"zone of the machine", `package p; import "time"; var z = time.Local`, "x.go:1: uses time.Local"},
		{"clock without a name", `package p; import . "time"; var t = Now()`, "x.go:1: imports time without a name"},
		{"goroutine", `package p; func f() { go f() }`, "x.go:1: starts a goroutine"},
		{"disk", `package p; import _ "os"`, "x.go:1: imports os"},
		{"plain", `package p; import "time"; func f(now time.Time) time.Time { return now.Add(time.Second) }`, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			fset := token.NewFileSet()
			f, err := parser.ParseFile(fset, "x.go", tt.src, 0)
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(impure(fset, f), "\n"); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}
