package traci

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

// process is a running sumo.
type process struct {
	cmd    *exec.Cmd
	cancel context.CancelFunc
	exited chan struct{} // closed when it has ended
	err    error         // how it ended; valid after exited
	stderr *tail
}

// startSUMO starts the program with args. It is killed when ctx ends.
func startSUMO(ctx context.Context, program string, args []string) (*process, error) {
	path, err := exec.LookPath(program)
	if err != nil {
		return nil, kind.Errorf(kind.NotFound, "starting sumo: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	p := &process{cancel: cancel, exited: make(chan struct{}), stderr: &tail{limit: 8 << 10}}
	p.cmd = exec.CommandContext(ctx, path, args...)
	p.cmd.Stderr = p.stderr
	// A child of sumo that kept the pipe open must not keep Wait from returning.
	p.cmd.WaitDelay = time.Second
	if err := p.cmd.Start(); err != nil {
		cancel()
		return nil, fmt.Errorf("starting sumo: %w", err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.exited)
	}()
	return p, nil
}

// kill ends the process and waits until it has ended.
func (p *process) kill() {
	p.cancel()
	<-p.exited
}

// died says why the process ended, with the end of what it wrote to stderr.
func (p *process) died() error {
	text := strings.Join(strings.Fields(p.stderr.String()), " ")
	if text == "" {
		text = "it wrote nothing to stderr"
	}
	if p.err == nil {
		return fmt.Errorf("sumo has ended: %s", text)
	}
	return fmt.Errorf("sumo has ended (%w): %s", p.err, text)
}

// tail keeps the last bytes written to it.
type tail struct {
	mu    sync.Mutex
	b     []byte
	limit int
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	if n := len(t.b) - t.limit; n > 0 {
		t.b = append(t.b[:0], t.b[n:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.b)
}

// client is a TraCI connection to a process of its own. Not safe for
// concurrent use.
type client struct {
	ctx     context.Context // ends the process; kept to say so in errors
	proc    *process
	conn    net.Conn
	in      *bufio.Reader
	buf     []byte // the answer in hand, reused
	out     []byte // header of the message in hand
	version string
}

// attempts is how often a start is tried: a free port may be taken by somebody
// else before SUMO listens on it.
const attempts = 3

// dialSUMO starts sumo with args and connects to it.
func dialSUMO(ctx context.Context, program string, args []string, within time.Duration) (*client, error) {
	var err error
	for range attempts {
		var port int
		if port, err = freePort(); err != nil {
			return nil, err
		}
		var c *client
		if c, err = dialOnce(ctx, program, args, port, within); err == nil {
			return c, nil
		}
		// Only a port that was taken meanwhile is worth another try.
		if !strings.Contains(err.Error(), "Address already in use") {
			break
		}
	}
	return nil, err
}

func dialOnce(ctx context.Context, program string, args []string, port int, within time.Duration) (*client, error) {
	args = append(args[:len(args):len(args)], "--remote-port", strconv.Itoa(port), "--num-clients", "1")
	proc, err := startSUMO(ctx, program, args)
	if err != nil {
		return nil, err
	}
	c := &client{ctx: ctx, proc: proc}
	if err := c.connect(port, within); err != nil {
		proc.kill()
		return nil, err
	}
	return c, nil
}

func (c *client) connect(port int, within time.Duration) error {
	address := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	deadline := time.NewTimer(within)
	defer deadline.Stop()
	dialer := net.Dialer{Timeout: within}
	for {
		conn, err := dialer.DialContext(c.ctx, "tcp", address)
		if err == nil {
			c.conn, c.in = conn, bufio.NewReaderSize(conn, 64<<10)
			break
		}
		retry := time.NewTimer(10 * time.Millisecond)
		select {
		case <-c.proc.exited:
			retry.Stop()
			return c.proc.died()
		case <-c.ctx.Done():
			retry.Stop()
			return fmt.Errorf("connecting to sumo: %w", c.ctx.Err())
		case <-deadline.C:
			retry.Stop()
			return kind.Errorf(kind.Unavailable, "connecting to sumo at %s: not ready within %s: %w", address, within, err)
		case <-retry.C:
		}
	}
	// SUMO answers this only when the network is loaded.
	var m message
	m.command(cmdVersion, nil)
	r, err := c.do(&m)
	if err != nil {
		return err
	}
	if refused := r.status(cmdVersion); refused != nil {
		return refused
	}
	r.length()
	r.u8()
	api := r.i32()
	c.version = r.str()
	if r.err != nil {
		return fmt.Errorf("sumo: version: %w", r.err)
	}
	if api < 20 {
		return kind.Errorf(kind.Invalid, "%s speaks TraCI %d, at least 20 is needed (SUMO 1.0)", c.version, api)
	}
	return nil
}

// do sends the message and returns SUMO's answer, valid until the next do.
func (c *client) do(m *message) (*reader, error) {
	c.out = binary.BigEndian.AppendUint32(c.out[:0], uint32(len(m.b)+4))
	c.out = append(c.out, m.b...)
	if _, err := c.conn.Write(c.out); err != nil {
		return nil, c.lost(err)
	}
	var head [4]byte
	if _, err := io.ReadFull(c.in, head[:]); err != nil {
		return nil, c.lost(err)
	}
	n, err := answerLength(head)
	if err != nil {
		return nil, err
	}
	if n > cap(c.buf) {
		c.buf = make([]byte, n, n+n/2)
	}
	c.buf = c.buf[:n]
	if _, err := io.ReadFull(c.in, c.buf); err != nil {
		return nil, c.lost(err)
	}
	return &reader{b: c.buf}, nil
}

func answerLength(head [4]byte) (int, error) {
	n := int(int32(binary.BigEndian.Uint32(head[:])))
	if n < 4 || n > maxMessage {
		return 0, fmt.Errorf("sumo: an answer of %d bytes, want 4 to %d", n, maxMessage)
	}
	return n - 4, nil
}

// lost explains a broken connection by what happened to the process, if
// something did.
func (c *client) lost(err error) error {
	if c.ctx.Err() != nil {
		return fmt.Errorf("sumo was stopped: %w", c.ctx.Err())
	}
	// The socket breaks a moment before the process can be waited for.
	wait := time.NewTimer(2 * time.Second)
	defer wait.Stop()
	select {
	case <-c.proc.exited:
		return c.proc.died()
	case <-wait.C:
		return fmt.Errorf("sumo: connection lost: %w", err)
	}
}

// end asks SUMO to end the simulation, so that it writes its outputs, and waits
// for it. After within it is killed.
func (c *client) end(within time.Duration) error {
	var m message
	m.command(cmdClose, nil)
	_ = c.conn.SetDeadline(time.Now().Add(within))
	r, err := c.do(&m)
	if err == nil {
		if refused := r.status(cmdClose); refused != nil {
			err = refused
		}
	}
	// SUMO ends when its client hangs up.
	err = errors.Join(err, c.conn.Close())
	wait := time.NewTimer(within)
	defer wait.Stop()
	select {
	case <-c.proc.exited:
		if c.proc.err != nil {
			err = errors.Join(err, c.proc.died())
		}
	case <-wait.C:
		err = errors.Join(err, fmt.Errorf("sumo did not end within %s", within))
	}
	c.proc.kill()
	return err
}

// kill ends the process at once.
func (c *client) kill() {
	_ = c.conn.Close() // the process is gone in a moment, nothing is lost with it
	c.proc.kill()
}

// freePort finds a port that nobody listens on. It lies below the ports that
// the kernel hands out to outgoing connections, because dialling an ephemeral
// port of one's own machine over and over ends in a connection to oneself.
func freePort() (int, error) {
	var last error
	for range 64 {
		port := 20000 + rand.IntN(12000)
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err != nil {
			last = err
			continue
		}
		if err := l.Close(); err != nil {
			return 0, fmt.Errorf("looking for a free port: %w", err)
		}
		return port, nil
	}
	return 0, kind.Errorf(kind.Unavailable, "looking for a free port: %w", last)
}
