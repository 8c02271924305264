package servicetest

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// MQTT is a small MQTT 3.1.1 client for loads and for misbehaviour, which stock
// clients are bad at: it has no goroutines and sends what it is told to.
type MQTT struct {
	Conn net.Conn
	r    *bufio.Reader

	mu sync.Mutex // of w and id
	w  *bufio.Writer
	id uint16
}

// Refused is the return code of a CONNACK that is not 0.
type Refused byte

func (r Refused) Error() string { return fmt.Sprintf("CONNACK with return code %d", byte(r)) }

// DialMQTT connects over TCP, with a clean session and no keep-alive.
func DialMQTT(addr, clientID, user, password string) (*MQTT, error) {
	c, err := net.DialTimeout("tcp", addr, 30*time.Second)
	if err != nil {
		return nil, err
	}
	// Small buffers: a test may have thousands.
	m := &MQTT{Conn: c, r: bufio.NewReaderSize(c, 512), w: bufio.NewWriterSize(c, 512)}
	body := append(text(nil, "MQTT"), 4, 0xc2, 0, 0)
	body = text(text(text(body, clientID), user), password)
	err = errors.Join(c.SetDeadline(time.Now().Add(30*time.Second)), m.write(0x10, body), m.w.Flush())
	if err == nil {
		var kind byte
		var b []byte
		switch kind, b, err = m.Read(); {
		case err != nil:
		case kind != 0x20 || len(b) != 2:
			err = fmt.Errorf("packet %#x with %d bytes, want CONNACK", kind, len(b))
		case b[1] != 0:
			err = Refused(b[1])
		default:
			err = c.SetDeadline(time.Time{})
		}
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return m, nil
}

// Subscribe asks for a topic and waits for the answer, which must be the next
// packet that comes.
func (m *MQTT) Subscribe(topic string, qos byte) error {
	id := m.next()
	err := m.write(0x82, append(text(binary.BigEndian.AppendUint16(nil, id), topic), qos))
	if err = errors.Join(err, m.Flush()); err != nil {
		return err
	}
	kind, b, err := m.Read()
	if err == nil && (kind != 0x90 || len(b) != 3 || b[2] != qos) {
		err = fmt.Errorf("packet %#x % x, want a SUBACK with QoS %d", kind, b, qos)
	}
	return err
}

// Publish puts a message into the buffer and returns its packet id, 0 with QoS 0.
// [MQTT.Flush] sends it.
func (m *MQTT) Publish(topic string, qos byte, payload []byte) (uint16, error) {
	body := text(make([]byte, 0, len(topic)+len(payload)+4), topic)
	id := uint16(0)
	if qos > 0 {
		id = m.next()
		body = binary.BigEndian.AppendUint16(body, id)
	}
	return id, m.write(0x30|qos<<1, append(body, payload...))
}

// Flush sends what is in the buffer.
func (m *MQTT) Flush() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.w.Flush()
}

// Read returns the next packet: its first byte and its body. Of a message to a
// topic the body is the payload alone; messages come with QoS 0.
func (m *MQTT) Read() (kind byte, body []byte, err error) {
	if kind, err = m.r.ReadByte(); err != nil {
		return 0, nil, err
	}
	n, err := binary.ReadUvarint(m.r) // MQTT's lengths are coded alike
	if err != nil {
		return 0, nil, err
	}
	body = make([]byte, n)
	if _, err = io.ReadFull(m.r, body); err != nil {
		return 0, nil, err
	}
	if kind&0xf0 == 0x30 {
		if len(body) < 2 || len(body) < 2+int(binary.BigEndian.Uint16(body)) {
			return 0, nil, errors.New("a message shorter than its topic")
		}
		body = body[2+binary.BigEndian.Uint16(body):]
	}
	return kind, body, nil
}

// Close ends the connection without a word.
func (m *MQTT) Close() error { return m.Conn.Close() }

func (m *MQTT) next() uint16 {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.id++; m.id == 0 {
		m.id = 1
	}
	return m.id
}

func (m *MQTT) write(kind byte, body []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, err := m.w.Write(append(binary.AppendUvarint([]byte{kind}, uint64(len(body))), body...))
	return err
}

func text(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(len(s))), s...)
}
